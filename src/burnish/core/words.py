"""What an update offers to the other parts of a recipe, word by word.

A part that hangs on the update relies on something of it: a gradient to score, a schedule to be
honoured, a rounding to be carried out. An optimizer answer that works otherwise than most (it makes
no gradient, or frees each one at once) says so, and what it does not honour is refused when the
recipe is read, never accepted and ignored.

    a part relies on  ``Method.relies_on``, the word of its own optimizer answer
                      (``answer.word``), and "objective" where it has an objective
    an answer honours ``answer.honours``: the words it honours, where those are all it honours
                      (own steps), else everything but ``answer.hides``
    and says why not  ``answer.why``: word -> reason, printed in the refusal
    any part denies   ``Method.denies``: word -> why nothing beside it may rely on that
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .errors import RecipeError

if TYPE_CHECKING:
    from .method import Method

WORDS: dict[str, str] = {
    "gradient": "each tensor's gradient beside its new value (the event tensor_updated)",
    "gradients": "all gradients at once, before the update (the event before_update)",
    "schedule": "tensors that join and leave between updates",
    "objective": "terms beside the task's loss",
    "resize": "optimizer state in the tensor's own shape, which can grow and shrink with it",
    "around_step": "further passes around a forward and backward (the event around_step)",
    "subspace": "a gradient to project",
    "transform": "a gradient to change on its way to the rule",
    "rounding": "a step whose result it may round",
    "step site": "a backward pass to step in",
    "groups": "learning rates and decays of their own for some tensors",
}


def honours(answer: Any, word: str) -> bool:
    """Does this answer honour a word? An own step that declares nothing honours nothing."""
    own = getattr(answer, "honours", () if hasattr(answer, "build") else None)
    return word in own if own is not None else word not in getattr(answer, "hides", ())


def why(answer: Any, word: str) -> str:
    """The reason in a refusal."""
    said = getattr(answer, "why", {}).get(word)
    return said or f"there is no part for {WORDS.get(word, word)}"


def relied_on(part: Method) -> tuple[str, ...]:
    """The words a part relies on, of whatever optimizer stands beside it."""
    axes = part.axes()
    own = getattr(part.optimizer(), "word", None) if "optimizer" in axes else None
    terms = ("objective",) if "objective" in axes else ()
    return (*part.relies_on, *terms, *((own,) if own else ()))


def check(parts: Sequence[Method]) -> None:
    """Refuse a part whose words the recipe's optimizer does not honour."""
    for part, answer in _answers(parts):
        for other in parts:
            for word in relied_on(other) if other is not part else ():
                if not honours(answer, word):
                    _refuse(parts, part, other, word, why(answer, word))
    for part in parts:
        for other in parts:
            for word in relied_on(other) if other is not part else ():
                if word in part.denies:
                    _refuse(parts, other, other, word, part.denies[word], part)


def _refuse(parts: Sequence[Method], leave: Method, other: Method, word: str, reason: str,
            part: Method | None = None) -> None:
    part = leave if part is None else part
    rest = " + ".join(str(p) for p in parts if p is not leave)
    raise RecipeError(f"{part.name} and {other.name} cannot be joined: {other.name} needs "
                      f"{WORDS.get(word, word)}, but with {part.name} {reason}; "
                      f"nearest recipe that works: {rest}")


def _answers(parts: Sequence[Method]) -> Iterator[tuple[Method, Any]]:
    for part in parts:
        if "optimizer" in part.axes() and (answer := part.optimizer()) is not None:
            yield part, answer
