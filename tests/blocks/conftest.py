"""Triton is for Linux: elsewhere nothing of it can be installed, and its tests are not there."""

from __future__ import annotations

import sys

collect_ignore_glob = [] if sys.platform == "linux" else ["test_triton_*.py"]
