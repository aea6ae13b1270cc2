"""Work that can stand still in its middle: the user's handler waits inside its model call while others go on.

A handler does pre-processing, the model and post-processing in one call of `handle()`. In a thread of its own that
call can stop where it reaches the model and go on when the scores are there, whatever the handler looks like.
Only one thread runs at any time, so a handler needs no locks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class Dropped(BaseException):
    """Ends work that nobody waits for any more, past any 'except Exception' of the user's."""


class SuspendedWork:
    """A function at work, which can ask its caller for something and wait for it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.asked: Any = None
        """What it waits for an answer to; only while it is not done."""
        self.done = False
        self._function = function
        self._outcome: Any = None
        self._error: BaseException | None = None
        self._reply: SimpleQueue[Any] = SimpleQueue()
        self._turn: SimpleQueue[None] = SimpleQueue()
        """Filled when it is the caller's turn again."""
        self._dropped = False

    def result(self) -> Any:
        """Return what the function returned, or raise what it raised."""
        if self._error is not None:
            raise self._error
        return self._outcome

    def resume(self, reply: Any) -> None:
        """Answer what was asked and run until the next question or the end."""
        self._reply.put(reply)
        self._turn.get()

    def drop(self) -> None:
        """Let the function end as if what it waits for had failed; does nothing when it is done."""
        if not self.done:
            self._dropped = True
            self.resume(None)

    def ask(self, question: Any) -> Any:
        """Wait, in the function's thread, for the caller's answer.

        Raises:
            Dropped: nobody waits for this work any more.
        """
        if not self._dropped:
            self.asked = question
            self._turn.put(None)
            reply = self._reply.get()
        if self._dropped:
            raise Dropped
        return reply

    def run(self) -> None:
        """Run to the end in this thread."""
        try:
            self._outcome = self._function()
        except BaseException as error:
            self._error = error
        self.done = True

    def give_back(self) -> None:
        """Let the caller go on after the end."""
        self._turn.put(None)

    def wait(self) -> None:
        """Wait for the first question or the end."""
        self._turn.get()


class Threads:
    """Threads for suspended work, kept for the next: each has its own OpenMP threads, which are slow to start."""

    def __init__(self) -> None:
        self._idle: list[SimpleQueue[SuspendedWork]] = []
        self._current = threading.local()

    def start(self, function: Callable[[], Any]) -> SuspendedWork:
        """Run a function until it asks something or ends."""
        work = SuspendedWork(function)
        inbox = self._idle.pop() if self._idle else self._new_thread()
        inbox.put(work)
        work.wait()
        return work

    def current(self) -> SuspendedWork | None:
        """Return the work that this thread does, if it is one of these threads."""
        return getattr(self._current, "work", None)

    def _new_thread(self) -> SimpleQueue[SuspendedWork]:
        inbox: SimpleQueue[SuspendedWork] = SimpleQueue()
        # A daemon: work that stands still must not keep the process alive.
        threading.Thread(target=self._serve, args=(inbox,), daemon=True).start()
        return inbox

    def _serve(self, inbox: SimpleQueue[SuspendedWork]) -> None:
        while True:
            work = self._current.work = inbox.get()
            work.run()
            self._current.work = None
            self._idle.append(inbox)
            work.give_back()
            del work  # its request need not stay until the next
