"""Generators: from prompts to rows."""
