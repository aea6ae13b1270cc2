"""The attributes of a handler, of which each of several calls that go on side by side has its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from early_exit.handler.user_handler.context import HandlerContext
from early_exit.handler.user_handler.entry_point import UserHandler

_State = list[dict[str, Any]]


class HandlerAttributes:
    """Lets calls of one handler wait in their middle, in threads of which one runs at a time.

    What a call sets on the handler or on its context before it waits is there for that call alone when it goes on, and
    for later calls once it has ended. All calls have the same handler, as its methods may be known elsewhere: to a hook
    in its model, say.
    """

    def __init__(self, handler: UserHandler, context: HandlerContext) -> None:
        nothing: frozenset[str] = frozenset()
        self._objects = [(vars(handler), nothing), (vars(context), nothing), context.put_on_it()]
        self._call = threading.local()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Run a call of the handler inside the block."""
        before = self._call.shared = self._state()
        try:
            yield
        except BaseException:
            self._restore(self._call.shared)
            raise
        after = self._state()
        self._restore(self._call.shared)
        for (attributes, _), old, new in zip(self._objects, before, after):
            attributes.update({name: value for name, value in new.items()
                               if name not in old or old[name] is not value})

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let other calls run inside the block, which a call of the handler enters."""
        own = self._state()
        self._restore(self._call.shared)
        try:
            yield
        finally:
            self._call.shared = self._state()
            self._restore(own)

    def _state(self) -> _State:
        return [{name: value for name, value in attributes.items() if name not in fixed}
                for attributes, fixed in self._objects]

    def _restore(self, state: _State) -> None:
        for (attributes, fixed), values in zip(self._objects, state):
            for name in [name for name in attributes if name not in fixed and name not in values]:
                del attributes[name]
            attributes.update(values)
