"""The user's own handler, whose model is replaced."""
