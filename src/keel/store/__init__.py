"""Where runs are written down: one SQLite file that a training process writes and any number of pages read."""
