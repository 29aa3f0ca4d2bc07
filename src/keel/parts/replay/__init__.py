"""Rows of earlier batches and of earlier policies that take part in an online step."""
