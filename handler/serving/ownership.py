"""What a worker knows about which rows of the model's input belong to which request."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Hashable, Sequence
from contextlib import suppress
from enum import Enum
from random import Random

from early_exit.handler.call import Call, share_instances
from early_exit.handler.inference.forward import Live
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.sample_request import content_types_in
from early_exit.handler.serving.isolation import Served
from early_exit.handler.user_handler.alone import copied, rows_alone
from early_exit.handler.user_handler.context import HandlerContext
from early_exit.handler.user_handler.description import HandlerDescription
from early_exit.handler.user_handler.entry_point import UserHandler
from early_exit.handler.user_handler.kept_state import StateSharedError
from early_exit.handler.user_handler.rows import ANOTHER_ORDER, Rows, is_equal, joined

logger = logging.getLogger(__name__)

_MOST_KINDS = 50
_ONE_IN = 1000
"""After this many batches of several requests, a worker checks one in this many."""


class Unknown(str, Enum):
    """Why a worker does not know which rows belong to which request."""

    ARCHIVE = "archive"
    """`ee-archive` noticed it when it packaged the handler, because it let the handler prepare two requests."""
    CHECK = "check"
    """The worker's own check failed: a request prepared alone did not give the rows that it had in its batch, or the
    check cannot be made because of threads of the handler."""
    COUNT = "count"
    """Some batches had another number of rows than their requests make. For the other batches, the owners are known."""
    THREADS = "threads"
    """For some batches, the handler called the model in several threads, which end in any order."""
    ENVELOPE = "envelope"
    """An envelope of TorchServe put the instances of several requests into one list."""


def _kind_of(call: Call) -> Hashable:
    """Return the names of the parts of a request, with the types of what the handler receives and of the content."""
    parts = [(name, type(value).__name__) for item in call.items if isinstance(item, dict)
             for name, value in item.items()]
    return tuple(sorted(set(parts))), tuple(sorted(content_types_in(call.headers).items()))


class RowOwnership:
    """Tells which rows belong to which request in batches of several requests; a single request owns all rows."""

    def __init__(self, description: HandlerDescription) -> None:
        """Begin with the description that `ee-archive` made of the handler."""
        self.rows_per_request = description.rows_per_request
        """The number of rows that each request becomes, side by side in the order of the requests; None if that is not
        known."""
        self.unknown: set[Unknown] = set()
        """The reasons why this worker has not known the owners of some rows so far."""
        if self.rows_per_request is None:
            self._say(Unknown.ARCHIVE, "batches of several requests", description.rows_unknown_because)

    def contradicted(self, because: str) -> None:
        """Treat the owners of rows as unknown from now on, because the description is wrong or cannot be checked.

        Args:
            because: the observation, as a clause that can follow 'because'.
        """
        self.rows_per_request = None
        self._say(Unknown.CHECK, "batches of several requests from now on", because)

    def note(self, served: Served) -> None:
        """Log if it is not known which rows of a batch belong to which request."""
        if not served.batches or served.owners is not None or self.rows_per_request is None:
            return
        n_rows = sum(len(batch.answers.outputs) for batch in served.batches)
        n_items = sum(len(call.items) for call in served.calls)
        if share_instances(served.calls):
            self._say(Unknown.ENVELOPE, "some batches of several requests",
                      "an envelope puts the instances of several requests into one list")
        elif n_rows == n_items * self.rows_per_request:
            self._say(Unknown.THREADS, "some batches of several requests",
                      "the handler calls its model in several threads")
        else:
            self._say(Unknown.COUNT, "some batches of several requests",
                      f"the handler made {n_rows} rows from {n_items} requests, where {self.rows_per_request} per "
                      "request were expected")

    def _say(self, how: Unknown, batches: str, because: str) -> None:
        if how not in self.unknown:
            self.unknown.add(how)
            logger.warning("In %s, it is not known which row of the model's input belongs to which request, because "
                           "%s. These batches get the same answers, but without X-Early-Exit headers, and their "
                           "records name no request", batches, because)


class DrawnRequest:
    """A request that was drawn from a batch for the check, and the model's inputs for the batch."""

    def __init__(self, position: int, call: Call) -> None:
        self.position = position
        # A handler may change its input.
        self.call = copy.deepcopy(call)
        self._batch: list[Rows] = []

    def keep(self, inputs: Live) -> None:
        """Keep the inputs of a call of the model, if there is memory for them; this never raises."""
        with suppress(Exception):
            self._batch.append(copied(inputs))

    def rows(self, owners: Sequence[Sequence[int]]) -> Rows | None:
        """Return the rows of the request, or None if the inputs do not have the rows in `owners`."""
        batch = joined(self._batch)
        of_row = [owner for of_call in owners for owner in of_call]
        if batch is None or len(batch[0]) != len(of_row):
            return None
        own = [row for row, owner in enumerate(of_row) if owner == self.position]
        return tuple(x[own] for x in batch)


class RowCheck:
    """Checks the first batch of several requests, the second with a probability of 1/2, and so on down to 1 in 1,000.

    A handler may order its batch by a property of the requests, such as their length. `ee-archive` does not notice this
    if its two requests have the same property. Most batches in service show it, so this check soon notices it. A
    handler may also order them by their kind, and mixed batches may be rare. Batches are therefore counted by the kinds
    of requests in them: by the names of their parts and by the types of these.
    """

    def __init__(self, model: EarlyExitModel, handler: UserHandler, context: HandlerContext, ownership: RowOwnership,
                 random: Random | None = None) -> None:
        """Begin without batches.

        Args:
            model: the model that the handler calls.
            handler: the user's handler.
            context: the handler's context.
            ownership: is told if a check contradicts it.
            random: draws batches and requests.
        """
        self._model, self._handler, self._context, self._ownership = model, handler, context, ownership
        self._random = random or Random()
        self._n_batches: Counter[Hashable] = Counter()
        """The number of batches by the kinds of requests in them. All kinds count as one after the first
        `_MOST_KINDS`, because clients may make up kinds."""

    def draw(self, calls: Sequence[Call]) -> DrawnRequest | None:
        """Draw the request of a batch that is to be checked, or return None if the batch is not checked."""
        if len(calls) == 1 or self._ownership.rows_per_request is None or share_instances(calls):
            return None
        kinds: Hashable = frozenset(map(_kind_of, calls))
        kinds = kinds if kinds in self._n_batches or len(self._n_batches) < _MOST_KINDS else None
        self._n_batches[kinds] += 1
        if self._random.random() * min(self._n_batches[kinds], _ONE_IN) >= 1:
            return None
        position = self._random.randrange(len(calls))
        with suppress(Exception):  # some inputs cannot be copied, such as JSON that is nested too deeply
            return DrawnRequest(position, calls[position])
        return None

    def check(self, drawn: DrawnRequest, served: Served) -> bool:
        """Tell whether the request, prepared alone, gives the rows that it had in its batch; this never raises.

        Args:
            drawn: the request that was drawn from the batch.
            served: the whole batch.
        """
        with suppress(Exception):  # such as a lack of memory, which must not affect the answers
            in_batch = drawn.rows(served.owners or ())
            try:
                alone = in_batch and rows_alone(drawn.call, self._handler, self._context, self._model)
            except StateSharedError as error:
                self._ownership.contradicted(str(error))
                return False
            if alone is not None and not is_equal(alone, in_batch):
                self._ownership.contradicted(ANOTHER_ORDER)
                return False
        return True
