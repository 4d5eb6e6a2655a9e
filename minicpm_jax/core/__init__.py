"""Shared low layer: types, trees, mesh, randomness, metrics, logging, downloads."""
