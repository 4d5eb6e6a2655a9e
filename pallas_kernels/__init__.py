"""Kernels with references and several backends; depends on jax and numpy only."""
