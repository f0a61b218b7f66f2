"""``python -m benchmarks.letters merging``: its rows, and docs/letters/merging.md made of them.

``--pages`` makes every page again of the rows that are there, and runs nothing.
"""

from __future__ import annotations

import argparse

from . import letter as letters


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("names", nargs="*", choices=[*letters.names(), []])
    ask.add_argument("--pages", action="store_true")
    a = ask.parse_args()
    if not a.pages:
        from burnish.fit.driving import quiet_libraries

        quiet_libraries()
        for name in a.names:
            letters.run(name)
    letters.PAGES.mkdir(exist_ok=True)
    for name in letters.names() if a.pages else a.names:
        text = letters.page(letters.letter(name), *letters.read(name))
        (letters.PAGES / f"{name}.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
