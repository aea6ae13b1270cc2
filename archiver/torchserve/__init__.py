"""`ee-serve`, TorchServe's process and its management API."""
