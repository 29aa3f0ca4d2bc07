"""Rewards: verifiers, the processes they run in, and the scoring of a batch."""
