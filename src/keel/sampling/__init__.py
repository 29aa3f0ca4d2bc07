"""Samplers over a chain: every way to draw from the tilt of a frozen policy."""
