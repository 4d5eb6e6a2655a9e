"""Activations in 16 or 32 bits times 8-bit weights."""
