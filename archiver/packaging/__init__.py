"""`ee-archive`: writes and describes early-exit archives."""
