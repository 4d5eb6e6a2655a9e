"""Drafters: what proposes tokens that the target verifies; `base` has the protocol."""
