"""The model object that stands in for the user's: assembled, loaded, called, and what it logs of its calls."""
