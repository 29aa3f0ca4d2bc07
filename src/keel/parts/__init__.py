"""The parts, one folder for each slot."""
