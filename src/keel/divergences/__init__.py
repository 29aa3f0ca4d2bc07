"""Divergences between distributions: over the whole vocabulary, and estimated from samples."""
