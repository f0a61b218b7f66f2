"""``python -m burnish``."""

import sys

from burnish.cli import run

if __name__ == "__main__":
    sys.exit(run())
