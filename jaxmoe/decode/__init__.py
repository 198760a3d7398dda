"""Decoding: sampling, verification of drafts, drafters and grammars."""
