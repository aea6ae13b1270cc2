"""Answers that are sent with their batch: the user's handler gets all requests at once, as in the original archive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from early_exit.handler.call import Call, Reply
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.serving.isolation import Served, answer_calls
from early_exit.handler.serving.ownership import RowCheck, RowOwnership
from early_exit.handler.serving.telemetry import Telemetry
from early_exit.handler.user_handler.context import HandlerContext
from early_exit.handler.user_handler.entry_point import UserHandler


class BatchAnswers:
    """Answers one batch after the other."""

    def __init__(self, model: EarlyExitModel, handler: UserHandler, context: HandlerContext, ownership: RowOwnership,
                 telemetry: Telemetry) -> None:
        """Begin without batches.

        Args:
            model: the model that the handler calls.
            handler: the user's handler.
            context: the handler's context.
            ownership: says which rows belong to which request.
            telemetry: is told everything that is served.
        """
        self._model, self._handler, self._context = model, handler, context
        self._ownership, self._telemetry = ownership, telemetry
        self._check = RowCheck(model, handler, context, ownership)

    def step(self, calls: Sequence[Call]) -> list[Reply | None]:
        """Return the reply to each call, in order.

        Raises:
            MemoryError, torch.AcceleratorError: this worker is out of memory, or its device has failed.
        """
        replies: list[Reply | None] = [None] * len(calls)
        for served in self._checked(calls):
            self._ownership.note(served)
            self._telemetry.note(served)
            for position, reply in zip(served.positions, served.replies):
                replies[position] = reply
        return replies

    def _checked(self, calls: Sequence[Call]) -> list[Served]:
        drawn = self._check.draw(calls)
        if drawn is None:
            return self._answered(calls)
        with self._model.log.watched(drawn.keep):
            parts = self._answered(calls)
        if len(parts) > 1 or self._check.check(drawn, parts[0]):  # with several parts, each request was alone
            return parts
        return [replace(parts[0], owners=None)]

    def _answered(self, calls: Sequence[Call]) -> list[Served]:
        return answer_calls(calls, self._handler, self._context, self._model, self._ownership.rows_per_request)
