"""Functions that can wait in the middle: the user's handler waits inside its call of the model while others continue.

A handler does pre-processing, inference and post-processing in one call of `handle()`. Here, this call runs in a thread
of its own. It can stop where it calls the model, and continue when the scores are ready, however the handler is
written. Only one thread runs at any time, so a handler needs no locks.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class Dropped(BaseException):
    """Ends a coroutine that nobody waits for any more; an 'except Exception' in the user's code does not catch it."""


class Coroutine:
    """A function in a thread of its own, which can ask its caller for something and wait for it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.asked: Any = None
        """The question that the function asks; valid until the function ends."""
        self.done = False
        """Whether the function has ended."""
        self._function = function
        self._before = contextvars.copy_context()
        self._context = self._before.copy()
        """The context variables of the function, which begins with those of its caller, as if it was called there.
        NumPy and `decimal` keep their settings in such variables."""
        self._outcome: Any = None
        self._error: BaseException | None = None
        self._reply: SimpleQueue[Any] = SimpleQueue()
        self._turn: SimpleQueue[None] = SimpleQueue()
        """Holds an item when the caller may continue."""
        self._dropped = False

    def result(self) -> Any:
        """Return the result of the function, or raise its exception; the caller gets the context variables that the
        function has set."""
        for variable, value in self._context.items():
            if self._before.get(variable, self) is not value:
                variable.set(value)
        if self._error is not None:
            raise self._error
        return self._outcome

    def resume(self, reply: Any) -> None:
        """Answer the question, and run until the next question or the end."""
        self._reply.put(reply)
        self._turn.get()

    def drop(self) -> None:
        """Make the function end by raising `Dropped` where it waits; this does nothing if the function has ended."""
        if not self.done:
            self._dropped = True
            self.resume(None)

    def ask(self, question: Any) -> Any:
        """Wait, in the function's thread, for the caller's answer.

        Raises:
            Dropped: nobody waits for this coroutine any more.
        """
        if not self._dropped:
            self.asked = question
            self._turn.put(None)
            reply = self._reply.get()
        if self._dropped:
            raise Dropped
        return reply

    def run(self) -> None:
        """Run the function to its end in this thread."""
        try:
            self._outcome = self._context.run(self._function)
        except BaseException as error:
            self._error = error
        self.done = True

    def give_back(self) -> None:
        """Let the caller continue after the end of the function."""
        self._turn.put(None)

    def wait(self) -> None:
        """Wait for the first question or the end."""
        self._turn.get()


class Coroutines:
    """Coroutines and their threads. Threads are reused, because each has OpenMP threads, which are slow to start."""

    def __init__(self) -> None:
        self._idle: list[SimpleQueue[Coroutine]] = []
        self._current = threading.local()

    def start(self, function: Callable[[], Any]) -> Coroutine:
        """Run a function until it asks something or ends."""
        coroutine = Coroutine(function)
        inbox = self._idle.pop() if self._idle else self._new_thread()
        inbox.put(coroutine)
        coroutine.wait()
        return coroutine

    def current(self) -> Coroutine | None:
        """Return the coroutine that runs in this thread, or None in any other thread."""
        return getattr(self._current, "coroutine", None)

    def _new_thread(self) -> SimpleQueue[Coroutine]:
        inbox: SimpleQueue[Coroutine] = SimpleQueue()
        # A daemon thread, because a coroutine that waits must not keep the process alive.
        threading.Thread(target=self._serve, args=(inbox,), daemon=True).start()
        return inbox

    def _serve(self, inbox: SimpleQueue[Coroutine]) -> None:
        while True:
            coroutine = self._current.coroutine = inbox.get()
            coroutine.run()
            self._current.coroutine = None
            self._idle.append(inbox)
            coroutine.give_back()
            del coroutine  # frees the memory of its request before the next one comes
