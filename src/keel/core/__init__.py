"""The vocabulary of Keel: rows, aggregation, randomness, registry, configuration, errors."""
