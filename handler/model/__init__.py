"""The model object that replaces the user's model: its assembly, loading, calls, and the log of its calls."""
