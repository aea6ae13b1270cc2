"""TorchServe as the host of a worker; only this package and `user_handler` know the server."""
