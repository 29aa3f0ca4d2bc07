"""Controllers: coefficients that adapt."""
