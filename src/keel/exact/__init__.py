"""Worlds small enough to enumerate, where the exact answer is known."""
