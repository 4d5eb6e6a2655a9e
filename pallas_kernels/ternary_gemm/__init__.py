"""Activations in 16 or 32 bits times packed ternary weights."""
