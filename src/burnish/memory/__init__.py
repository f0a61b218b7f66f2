"""Memory as a promise: what a recipe costs, said beforehand and checked afterwards."""

from __future__ import annotations

from .allocator import process_peak, steady_heap
from .ledger import Ledger
from .plan import Plan, Plans, plan
from .report import MemoryReport
from .simulate import SimulationError, measure, simulate
from .units import format_bytes, parse_bytes

__all__ = ["Ledger", "MemoryReport", "Plan", "Plans", "SimulationError", "format_bytes", "measure",
           "parse_bytes", "plan", "process_peak", "simulate", "steady_heap"]
