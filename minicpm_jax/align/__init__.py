"""Objectives beyond pretraining: losses that plug into `train.step`."""
