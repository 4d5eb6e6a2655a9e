"""Shared pieces of the kernels: dispatch, cases, tuning, benchmarks."""
