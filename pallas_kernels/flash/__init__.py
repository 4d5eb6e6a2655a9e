"""Dense attention: causal, grouped-query, packed."""
