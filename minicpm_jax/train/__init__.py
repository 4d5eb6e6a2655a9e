"""Training: step, loop, starts, evaluation, stopping."""
