"""Serving many requests: a pure scheduler over pages of keys and values, and the programs that run its plans."""
