"""Smaller models from larger ones: quantizers so far."""
