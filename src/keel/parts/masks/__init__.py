"""Token masks, computed once and shared by name."""
