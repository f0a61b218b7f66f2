"""Patterns that came with a file: what Python says of them, in bounded time (findings 4.5)."""

from __future__ import annotations

import random
import re
import time

import pytest

from burnish.core.errors import ConfigError
from burnish.core.patterns import Pattern

ALIKE = ["a", "abc", "a.c", r".*\.(q|v)_proj", "a*", "a+b?", "(a|b)*c", "(?:ab){2,3}", "a{0}",
         "[abc]+", "[^abc]", "[a-c0-9_]+", r"\w+\.\d+", r"\D\S\s?", "^a.*c$", r"\Aab\Z", "(?i)AbC",
         "(?i)[A-C]+", r"a\b.*", r"\Ba", "(?=a).*", "(?!a).*", r"(?!.*vision).*q_proj",
         r".*(?<=q)_proj", r".*(?<!k)_proj", "(?s).*", "(?m)^b$", "a*?b", "(a*)*", "(a*)+b",
         "(|a)+", "()*", "", "(?x) a b # c", "(?:a|ab)(?:c|bcd)", "(?P<name>a)b", "[]a]", "[^]]",
         "é+", "(?i)É", r"model\.layers\.(\d|1\d)\.mlp", "x{2,}", "(a{1,2}){2}"]
TEXTS = ["", "a", "b", "ab", "abc", "aXc", "ABC", "aaab", "abab", "ababab", "c", "aabbc", "\n",
         "a\nc", "b\n", "a\nb", "model.layers.3.mlp", "model.layers.13.mlp", "layers.0.q_proj",
         "vision.q_proj", "x.k_proj", "é", "É", "xx", "xxx", "]", "_9", "a b", "7 "]


@pytest.mark.parametrize("pattern", ALIKE)
def test_a_pattern_means_what_it_means_to_python(pattern):
    ours, theirs = Pattern(pattern), re.compile(pattern)
    for text in TEXTS:
        assert ours.fullmatch(text) == bool(theirs.fullmatch(text)), text
        assert ours.match(text) == bool(theirs.match(text)), text


def test_random_patterns_mean_what_they_mean_to_python():
    draw = random.Random(0)

    def made(depth):
        if depth == 0:
            return draw.choice(["a", "b", ".", "[ab]", "[^a]", r"\w", "c"])
        kind = draw.randrange(6)
        a, b = made(depth - 1), made(depth - 1)
        return [a + b, f"(?:{a}|{b})", f"(?:{a})?", f"(?:{a}){{0,2}}", f"(?:{a})*", f"(?={a}){b}"
                ][kind]

    for _ in range(400):
        pattern = made(draw.randrange(4))
        ours, theirs = Pattern(pattern), re.compile(pattern)
        for _ in range(8):
            text = "".join(draw.choice("abc") for _ in range(draw.randrange(7)))
            assert ours.fullmatch(text) == bool(theirs.fullmatch(text)), (pattern, text)


@pytest.mark.parametrize("pattern", ["(.*)*x", "(a|a)*x", "(a|aa)+x", "((a*)*)*x", "(a+)+x",
                                     ".*.*.*.*.*.*.*x", "(?=(a+)+x)a", "(.*){40}x", "a" * 50_000,
                                     "(?:a?){5000}a{5000}x", "((((((a?)*)*)*)*)*)*x",
                                     "(a{0,9999}){0,9999}x"])
def test_patterns_that_hang_others_end(pattern):
    began = time.process_time()
    try:
        assert not Pattern(pattern).fullmatch("a" * 200)
    except ConfigError as error:
        assert "takes too long" in str(error)
    assert time.process_time() - began < 20          # others take longer than there is time


@pytest.mark.parametrize("pattern,words", [
    ("(", "no regular expression"), ("[", "no regular"), ("a{2,1}", "no regular"),
    (r"(a)\1", "reference to a group"),
    ("(a)(?(1)b|c)", "reference to a group"), ("*", "no regular"), ("(" * 5000, "no|deep"),
    ("(" * 5000 + ")" * 5000, "no|deep"), ("x" * 200_000, "too long"), ("\\", "no regular"),
    ("a{99999999999999999999}", "no regular|fullmatch|too"), ("(?P<1>a)", "no regular")])
def test_what_is_no_pattern_is_one_line(pattern, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Pattern(pattern).fullmatch("aa")
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)
