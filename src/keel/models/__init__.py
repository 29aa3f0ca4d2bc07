"""Models: loading and saving, sources of frozen and moving copies, the built-in tiny model, heads."""
