"""Memory as a promise: what a recipe costs, said beforehand and checked afterwards."""

from __future__ import annotations

from .allocator import process_peak, steady_heap
from .ledger import Ledger
from .report import MemoryReport
from .units import format_bytes, parse_bytes

__all__ = ["Ledger", "MemoryReport", "format_bytes", "parse_bytes", "process_peak", "steady_heap"]
