"""Go on with a text: a decoder that has read one domain's words learns another's.

    python examples/passages.py                   # half a minute

It is drawn at random and reads docstrings of Python's library, all but those of one package; then
it learns those by LoRA, and says how likely it holds what it has not seen of them, beside what it
thought before. Nothing is downloaded. With texts of your own it is ``burnish fit --model m/qwen
--data notes/``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from library import functions
from taught import miniature, taught, words


def main(first: int = 1200, then: int = 400, epochs: int = 3, package: str = "unittest"
         ) -> dict[str, float]:
    own = [{"text": f.doc} for f in functions() if f.module.startswith(package)][:then]
    rest = [{"text": f.doc} for f in functions() if not f.module.startswith(package)][:first]
    pieces = words([r["text"] for r in rest], 512)
    how = {"lr": 4e-3, "epochs": epochs, "batch_size": 16, "max_length": 64}
    with miniature("decoder", pieces) as drawn, tempfile.TemporaryDirectory() as folder:
        taught(rest, drawn, "full", keep=Path(folder), **how)
        return taught(own, folder, beside=True, **how)


if __name__ == "__main__":
    main()
