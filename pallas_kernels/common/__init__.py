"""Shared pieces of the kernels: dispatch, launching, tuning, benchmarks."""
