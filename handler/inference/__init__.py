"""The forward pass with early exits, at once or one stage at a time."""
