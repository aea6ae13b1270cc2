"""The model's input that a user's handler prepares for a request alone, found without changes to the handler."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from early_exit.handler.call import Call
from early_exit.handler.inference.forward import Live
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.user_handler.context import HandlerContext, NoMetrics
from early_exit.handler.user_handler.entry_point import UserHandler
from early_exit.handler.user_handler.kept_state import state_kept
from early_exit.handler.user_handler.rows import Rows

_LOCK = type(threading.Lock())


class ModelReached(BaseException):
    """Ends a handler's work where it calls its model; an 'except Exception' in the handler does not catch it."""

    def __init__(self, given: tuple[object, ...], named: dict[str, object]) -> None:
        """Take the positional and the named arguments of the call."""
        self.given, self.named = given, named


def rows_alone(call: Call, handler: UserHandler, context: HandlerContext, model: EarlyExitModel) -> Rows | None:
    """Return the inputs of a handler's first call of its model for one request, or None if it does not call the model.

    The model does not compute, unless the handler catches all exceptions and calls the model again, calls it in a
    thread of its own, or holds a lock. What the handler keeps in its attributes, its class and
    its module stays unchanged (see `state_kept`). Log lines of the handler and its metrics of TorchServe are dropped.

    Args:
        call: the request; the handler may change its inputs.
        handler: the user's handler, between two calls.
        context: the handler's context, from which no more replies are needed.
        model: the model that the handler calls.

    Raises:
        StateSharedError: what the handler keeps has changed while a thread of it was alive, or cannot be restored.
    """
    reached: list[Rows] = []
    here = threading.get_ident()

    def stop(inputs: Live) -> None:
        if not reached:  # a handler that catches all exceptions may call again; then it must be able to end
            reached.append(copied(inputs))
            # Another thread is not interrupted, because it may also work for other calls. A handler that holds a lock
            # is not interrupted either, because it must release the lock.
            if threading.get_ident() == here and not _holds_a_lock(handler):
                raise ModelReached(inputs, {})

    model.log.begin()
    try:
        with state_kept(handler), suppress(Exception, ModelReached), _silence(), model.log.watched(stop):
            its_context = _copy_for(call, context)
            copy.copy(handler).handle([*call.items], its_context)
    finally:
        model.log.take()
        model.log.take_elsewhere()
    return reached[0] if reached else None


def copied(inputs: Live) -> Rows:
    """Return copies of the inputs of a call: stages and handlers may write into the tensors later."""
    return tuple(x.detach().clone() for x in inputs)


def _holds_a_lock(handler: UserHandler) -> bool:
    return any(value.locked() for value in vars(handler).values() if isinstance(value, _LOCK))


def _copy_for(call: Call, context: HandlerContext) -> HandlerContext:
    context.begin([call])  # a handler may have kept this context, and use it instead of its argument
    view = context.view()
    view.begin([call])
    view.metrics = NoMetrics()
    return view


@contextmanager
def _silence() -> Iterator[None]:
    """Drop this thread's log lines inside the block, and with them TorchServe's metrics; other threads still log."""
    here = threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != here

    loggers = [logging.getLogger(), *logging.getLogger().manager.loggerDict.values()]
    outputs = {output for logger in loggers for output in getattr(logger, "handlers", ())}
    for output in outputs:
        output.addFilter(is_of_others)
    try:
        yield
    finally:
        for output in outputs:
            output.removeFilter(is_of_others)
