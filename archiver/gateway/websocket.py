"""The WebSocket of the gateway: a batch comes in, and each answer leaves when it is ready."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from early_exit.archiver.gateway.messages import (
    TRY_LATER,
    BytesInFlight,
    Item,
    Limits,
    Malformed,
    NoRoom,
    Share,
    read_message,
)
from early_exit.archiver.gateway.upstream import Upstream, answer_item

logger = logging.getLogger(__name__)

Seen = Callable[[str, dict[str, Any]], None]
"""A function that receives the model and the message of every answer."""


async def serve_socket(socket: WebSocket, model: str, upstream: Upstream, limits: Limits, in_all: asyncio.Semaphore,
                       held: BytesInFlight, seen: Seen) -> None:
    """Serve one client, whose connection is accepted, until it leaves or sends a message that cannot be read."""
    with held.share() as share:
        await _serve(socket, model, upstream, limits, in_all, share, seen)


async def _serve(socket: WebSocket, model: str, upstream: Upstream, limits: Limits, in_all: asyncio.Semaphore,
                 share: Share, seen: Seen) -> None:
    own = asyncio.Semaphore(limits.in_flight)
    sending = asyncio.Lock()  # one answer at a time is in the connection's buffer; the others are counted here
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
            message = with_room(item, await message_of(item))
            share.give_back(len(item.body))
            if socket.client_state is WebSocketState.CONNECTED:
                try:
                    async with sending:
                        await socket.send_text(message)
                except (WebSocketDisconnect, RuntimeError):
                    left = True
            share.give_back(len(message))
        finally:
            own.release()

    def with_room(item: Item, message: str) -> str:
        """Return the message if it may be held until the client has read it, or else an error message."""
        try:
            share.take(len(message))
        except NoRoom as error:
            return json.dumps({"id": item.id, "status": 503, "error": str(error)})
        return message

    try:
        while True:
            received = await socket.receive()
            if received["type"] == "websocket.disconnect":
                return
            text, data = received.get("text"), received.get("bytes")
            waiting = deque(read_message(text if text is not None else data or b"", limits))
            del received, text, data  # bytes that are no longer counted must not be kept
            share.take(sum(len(item.body) for item in waiting))
            while waiting:
                await own.acquire()  # back-pressure: as long as this waits, nothing more is read
                if left:
                    return
                task = asyncio.create_task(answer(waiting.popleft()))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
    except (Malformed, NoRoom) as reason:
        await asyncio.gather(*tasks, return_exceptions=True)  # earlier items are answered
        code = reason.code if isinstance(reason, Malformed) else TRY_LATER
        # A close frame has room for 123 bytes of reason.
        await socket.close(code, str(reason).encode()[:120].decode(errors="ignore"))
    finally:
        for task in tasks:
            task.cancel()
