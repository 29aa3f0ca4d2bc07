"""Token weights: the letter w of the loss, always without gradient."""
