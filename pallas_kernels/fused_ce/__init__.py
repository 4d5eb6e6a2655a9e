"""Cross entropy of an unembedding without the [tokens, vocabulary] logits in memory."""
