"""Damage to files and texts, drawn from a seeded generator."""

from __future__ import annotations

import json
import random
from typing import Any

#: values nobody expects where they stand
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    10**4400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "0",
    "-1",
    "1e400",
    "nan",
    "false",
    "re:(.*)*x",
    "re:(",
    "../../x",
    "/dev/zero",
    "\0",
    "\ud800",
    "é",
    "x" * 5000,
    "lora(rank=9999999)",
    "full",
    "a\nb",
    [],
    {},
    [[]],
    [None],
    [{}],
    {"a": []},
    {"": 0},
    list(range(300)),
    ["\ud800"],
    {"recipe": "lora"},
    [["default", "x"]],
    "tensor",
    {"__is__": "tensor", "name": "nope"},
    {"__is__": "map", "items": 3},
    {"__is__": "generator", "state": 1},
    {"__is__": "dtype", "value": "load"},
]


def text_of(tree: Any) -> str:
    """JSON of anything in ODD."""
    if isinstance(tree, int) and not isinstance(tree, bool) and abs(tree) > 10**4000:
        return "1" + "0" * 4400
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {text_of(v)}" for k, v in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(text_of, tree)) + "]"
    return json.dumps(tree)


def spots(tree: Any, path: tuple = ()) -> list[tuple]:
    """Every place in a tree."""
    inner = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    return [path, *(s for k, v in inner for s in spots(v, (*path, k)))]


def put(tree: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    at = tree
    for k in path[:-1]:
        at = at[k]
    at[path[-1]] = value
    return tree


def tree(draw: random.Random, text: str) -> str:
    """JSON with one thing changed: a value, a name, a name twice, a thousand levels."""
    found = json.loads(text)
    where = draw.choice(spots(found))
    kind = draw.randrange(8)
    if kind < 4:
        return text_of(put(found, where, draw.choice(ODD)))
    if kind == 4:
        return text_of(put(found, where, "@HERE@")).replace(
            '"@HERE@"',
            draw.choice(
                ["[" * n + "]" * n for n in (60, 70, 2000, 100_000)]
                + ['{"a":' * 3000 + "1" + "}" * 3000, "NaN", "1e999", "1" * 5000]
            ),
        )
    if kind == 5 and isinstance(found, dict) and found:
        name = draw.choice(list(found))
        return text_of(found)[:-1] + f", {json.dumps(name)}: {text_of(draw.choice(ODD))}}}"
    parent = found
    for k in where[:-1]:
        parent = parent[k]
    if where and isinstance(parent, dict):
        value = parent.pop(where[-1])
        if kind == 6:
            parent[draw.choice(["", "é", "a.b", "\ud800", str(where[-1]) + "s"])] = value
    return text_of(found)


def data(draw: random.Random, raw: bytes) -> bytes:
    """Bytes with a few of them changed, cut, doubled or put in."""
    raw = bytearray(raw)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        i, j = sorted((draw.randrange(len(raw) + 1), draw.randrange(len(raw) + 1)))
        kind = draw.randrange(9)
        if kind == 0 and raw:
            raw[min(i, len(raw) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del raw[i:]
        elif kind == 2:
            del raw[i:j]
        elif kind == 3:
            raw[i:i] = raw[i:j]
        elif kind == 4:
            raw[i:i] = draw.randbytes(draw.randrange(1, 20))
        elif kind == 5:
            raw[i:j] = bytes(j - i)
        elif kind == 6:
            raw[i:i] = draw.choice(
                [
                    b"\xff",
                    b"\0",
                    b"\xef\xbb\xbf",
                    b"\xed\xa0\x80",
                    b'"',
                    b",",
                    b"\n",
                    b"[",
                    b"{",
                    b"9" * 5000,
                    b"NaN",
                    b"1e400",
                    b"\r",
                    b"\xc3",
                    b"&a *a",
                    b"!!python/object:x ",
                    b"!!int x",
                    b"(.*)*",
                    b"-",
                    b": ",
                ]
            )
        elif kind == 7:
            raw = bytearray(
                draw.choice(
                    [
                        b"",
                        b"\xef\xbb\xbf",
                        b"\xff\xfe",
                        b"null",
                        b"[]",
                        b"{}",
                        b"0",
                        b'"x"',
                        b"\n" * 9,
                        b"[" * 99_999,
                    ]
                )
            )
        else:
            raw = bytearray(
                bytes(raw)
                .decode("utf-8", "replace")
                .encode(draw.choice(["utf-16", "utf-8-sig", "utf-32"]))
            )
    return bytes(raw)


def words(draw: random.Random, text: str) -> str:
    """A text with pieces of the language, and of others, put anywhere."""
    for _ in range(draw.choice([1, 1, 2, 5])):
        i, j = sorted((draw.randrange(len(text) + 1), draw.randrange(len(text) + 1)))
        piece = draw.choice(
            [
                "(",
                ")",
                "+",
                ",",
                "=",
                "@",
                ":",
                "-",
                "re:",
                "*",
                "[",
                "]",
                "'",
                '"',
                "\0",
                "\ud800",
                "é",
                "9" * 4400,
                "1e400",
                "rank",
                "lora",
                "all",
                "head",
                "@-1",
                "@::0",
                "@9:1",
                " ",
                "\n",
                "{}",
                "(.*)*",
                "(?<=a)",
                "\\1",
                "x" * 2000,
                ".",
                "None",
                "True",
                "0x",
                "1_0",
                "GB",
                "kib",
                ",5",
                "e",
                "lambda: 0",
                "#",
                "f''",
            ]
        )
        text = draw.choice(
            [
                text[:i] + piece + text[i:],
                text[:i] + piece + text[j:],
                text[:i] + text[j:],
                text[:j] + text[i:],
                piece * draw.choice([1, 2, 900]),
            ]
        )
    return text
