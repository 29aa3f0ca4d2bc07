"""Surrogates, penalties and objectives: the letters f and P of the loss."""
