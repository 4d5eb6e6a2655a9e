"""Cross entropy of a language-model head without the full logits in memory."""
