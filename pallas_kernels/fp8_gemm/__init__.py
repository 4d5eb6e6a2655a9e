"""Products of FP8 matrices with block scales."""
