"""The user's own handler around a replaced model."""
