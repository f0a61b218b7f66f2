"""The command line: the library's words, a few lines each over its public face.

Exit codes: 0 done, 1 the work failed, 2 the call or its configuration was wrong, 3 no plan fits,
4 a check failed, 5 out of memory, 130 interrupted. What goes wrong is one line on stderr;
``BURNISH_DEBUG=1`` adds the traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..core.errors import BurnishError
from ..core.extras import told

__all__ = ["main", "run"]

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` excludes the program's name."""
    from .app import command

    try:
        args = list(sys.argv[1:] if argv is None else argv)
        result = command().main(args=args, prog_name="burnish", standalone_mode=False)
        sys.stdout.flush()
        if result == INTERRUPTED:                   # what the parser makes of Ctrl-C
            return _fail("interrupted", INTERRUPTED)
        return result if isinstance(result, int) else 0
    except BurnishError as error:
        from .flags import flags

        return _fail(flags(_line(error)), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:                         # `burnish methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if type(error).__name__ == "Abort":         # the same, in older versions of it
            return _fail("interrupted", INTERRUPTED)
        if hasattr(error, "format_message"):        # the parser's own complaints
            return _fail(error.format_message() or "what to do? `burnish --help`", 2)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return _fail(f"out of memory: {_line(error)}", 5)
        if isinstance(error, ModuleNotFoundError) and (lacks := told(error)):
            return _fail(lacks, 2)
        return _fail(f"{type(error).__name__}: {_line(error)}", 1)


def run() -> int:
    """:func:`main` as a whole process: one of several that train together leaves them in order."""
    code = main()
    if "torch" in sys.modules:
        from ..core.processes import leave

        leave(code)
    return code


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no details"


def _fail(message: str, code: int) -> int:
    if os.environ.get("BURNISH_DEBUG"):
        import traceback

        traceback.print_exc()
    print(f"burnish: {message}", file=sys.stderr)
    return code
