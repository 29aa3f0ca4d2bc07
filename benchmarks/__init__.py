"""Keel and its peers on the same work, in one process and in turns."""
