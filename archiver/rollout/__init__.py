"""`ee-roll`: brings a version into service without losing a request."""
