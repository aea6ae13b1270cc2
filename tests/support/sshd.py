"""An SSH server on a free port of 127.0.0.1, for one user with one key. It runs commands as the user who started it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncssh

USER = "trial"


@dataclass(frozen=True)
class Sshd:
    """A running server."""

    port: int
    key_file: Path
    """The private key of the user."""
    commands: list[str]
    """The commands that were run, in order."""


@contextmanager
def sshd(folder: Path) -> Iterator[Sshd]:
    """Run a server until the block ends. Its keys are written into the folder."""
    key = asyncssh.generate_private_key("ssh-rsa")
    key_file, allowed = folder / "id_rsa", folder / "authorized_keys"
    key.write_private_key(key_file, format_name="pkcs1-pem")
    key.write_public_key(allowed)
    loop, commands = asyncio.new_event_loop(), []
    environment = {**os.environ, "HOME": str(folder), "PIP_NO_INDEX": "1"}  # NNI asks pip to upgrade it
    thread = threading.Thread(target=loop.run_forever)

    async def run(process: asyncssh.SSHServerProcess[bytes]) -> None:
        commands.append(str(process.command))
        child = await asyncio.create_subprocess_exec(
            "bash", *(["-c", process.command] if process.command else []), cwd=folder, env=environment,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
        await process.redirect(child.stdin, child.stdout, child.stderr)
        process.exit(await child.wait())

    async def listen() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1", 0, server_host_keys=[asyncssh.generate_private_key("ssh-rsa")],
            authorized_client_keys=str(allowed), process_factory=run, sftp_factory=True, encoding=None)

    thread.start()
    server = asyncio.run_coroutine_threadsafe(listen(), loop).result(30)
    try:
        yield Sshd(server.get_port(), key_file, commands)
    finally:
        loop.call_soon_threadsafe(server.close)
        asyncio.run_coroutine_threadsafe(server.wait_closed(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
