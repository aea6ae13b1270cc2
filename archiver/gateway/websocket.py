"""The WebSocket of the gateway: a batch comes in, and each answer leaves when it is ready."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from early_exit.archiver.gateway.messages import Item, Limits, Malformed, read_message
from early_exit.archiver.gateway.upstream import Upstream, answer_item

logger = logging.getLogger(__name__)

Seen = Callable[[str, dict[str, Any]], None]
"""Is called with the model and the message of every answer."""


async def serve_socket(socket: WebSocket, model: str, upstream: Upstream, limits: Limits, in_all: asyncio.Semaphore,
                       seen: Seen) -> None:
    """Serve one client, whose connection is accepted, until it leaves or sends what cannot be read."""
    own = asyncio.Semaphore(limits.in_flight)
    tasks: set[asyncio.Task[None]] = set()
    left = False

    async def answered(item: Item) -> dict[str, Any]:
        if len(item.body) > limits.bytes_per_item:
            return {"status": 413, "error": f"an item may have {limits.bytes_per_item} bytes, this one has "
                    f"{len(item.body)}"}
        async with in_all:
            return await answer_item(upstream, model, item.body, anytime=item.anytime)

    async def message_of(item: Item) -> str:
        try:
            message = await answered(item)
            seen(model, message)
            return json.dumps({"id": item.id, **message})
        except Exception as error:  # whatever it is, the client waits for a message with this id
            logger.exception("an item cannot be answered")
            return json.dumps({"id": item.id, "status": 500, "error": f"the gateway fails: {error!r}"})

    async def answer(item: Item) -> None:
        nonlocal left
        try:
            message = await message_of(item)
            if socket.client_state is WebSocketState.CONNECTED:
                try:
                    await socket.send_text(message)
                except (WebSocketDisconnect, RuntimeError):
                    left = True
        finally:
            own.release()

    try:
        while True:
            received = await socket.receive()
            if received["type"] == "websocket.disconnect":
                return
            text, data = received.get("text"), received.get("bytes")
            for item in read_message(text if text is not None else data or b"", limits):
                await own.acquire()  # back-pressure: as long as this waits, nothing more is read
                if left:
                    return
                task = asyncio.create_task(answer(item))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
    except Malformed as reason:
        await asyncio.gather(*tasks, return_exceptions=True)  # what was asked before is answered
        # A close frame has room for 123 bytes of reason.
        await socket.close(reason.code, str(reason).encode()[:120].decode(errors="ignore"))
    finally:
        for task in tasks:
            task.cancel()
