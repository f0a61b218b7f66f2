"""Kernels of our own for accelerators, in Triton, and what decides where they run."""
