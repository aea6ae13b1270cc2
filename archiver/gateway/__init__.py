"""A gateway in front of TorchServe: answers of a batch one by one over a WebSocket, and a live page.

It needs the extra `[gateway]` and is no part of an archive: a process of its own, beside the server.
"""
