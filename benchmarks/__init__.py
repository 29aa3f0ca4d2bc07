"""Measurements side by side with a peer, in one run: medians and ratios, never an absolute time to hold on to."""
