"""Decoding against selected blocks of a contiguous or paged cache."""
