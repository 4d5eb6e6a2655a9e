"""The k largest logits of a vocabulary."""
