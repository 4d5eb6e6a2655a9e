"""Activations in 16 or 32 bits times packed 4-bit weights with a scale a group."""
