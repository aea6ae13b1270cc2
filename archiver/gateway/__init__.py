"""A gateway in front of TorchServe: sends the answers of a batch one by one over a WebSocket, and serves a live page.

It needs the extra `[gateway]`, is not part of an archive, and runs as a process of its own beside the server.
"""
