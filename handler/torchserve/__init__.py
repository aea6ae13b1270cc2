"""TorchServe as the host of a worker; the only room of the handler that knows its server."""
