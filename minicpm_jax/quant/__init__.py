"""Low-bit weights: the QTensor leaf, quantisers, QAT forward, FP8 (quantization.md)."""
