"""Whose the rows of the model's input are, as far as a worker knows."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from random import Random

from early_exit.handler.call import Call, share_instances
from early_exit.handler.inference.forward import Live
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.serving.isolation import Served
from early_exit.handler.user_handler.alone import copied, rows_alone
from early_exit.handler.user_handler.context import HandlerContext
from early_exit.handler.user_handler.description import HandlerDescription
from early_exit.handler.user_handler.entry_point import UserHandler
from early_exit.handler.user_handler.rows import ANOTHER_ORDER, Rows, is_equal, joined

logger = logging.getLogger(__name__)

_ONE_IN = 1000
"""Batches of several requests for one that is checked, once a worker has served so many."""


class Unknown(str, Enum):
    """How a worker came to know that it cannot tell whose rows are."""

    ARCHIVE = "archive"
    """`ee-archive` found it out with two requests when it packaged the handler."""
    CHECK = "check"
    """The worker's own check: a request prepared alone did not give the rows that it had in its batch."""
    COUNT = "count"
    """Some batches had another number of rows than their requests make; of the others it is known."""
    THREADS = "threads"
    """The handler called the model for some batches in several threads, which do not follow each other."""
    ENVELOPE = "envelope"
    """An envelope of TorchServe put what some requests hold into one list."""


class RowOwnership:
    """What a worker knows of the rows of batches of several requests; those of a single request are always its own."""

    def __init__(self, description: HandlerDescription) -> None:
        """Begin with what was found out about the handler when its archive was made."""
        self.rows_per_request = description.rows_per_request
        """How many rows each request becomes, side by side in the order of the requests; None where not known."""
        self.unknown: set[Unknown] = set()
        """What this worker found out so far."""
        if self.rows_per_request is None:
            self._say(Unknown.ARCHIVE, "batches", description.rows_unknown_because)

    def contradicted(self, because: str) -> None:
        """Know nothing more from now on: what was known of the handler is wrong.

        Args:
            because: what was seen of the handler.
        """
        self.rows_per_request = None
        self._say(Unknown.CHECK, "batches, from now on,", because)

    def note(self, served: Served) -> None:
        """Say so where it is not known whose the rows of a batch are."""
        if not served.batches or served.owners is not None or self.rows_per_request is None:
            return
        n_rows = sum(len(batch.answers.outputs) for batch in served.batches)
        n_items = sum(len(call.items) for call in served.calls)
        if share_instances(served.calls):
            self._say(Unknown.ENVELOPE, "some batches", "an envelope puts what several requests hold into one list")
        elif n_rows == n_items * self.rows_per_request:
            self._say(Unknown.THREADS, "some batches", "the handler calls its model in several threads")
        else:
            self._say(Unknown.COUNT, "some batches", f"the handler made {n_rows} rows of {n_items} requests, "
                                                     f"where {self.rows_per_request} of each were expected")

    def _say(self, how: Unknown, batches: str, because: str) -> None:
        if how not in self.unknown:
            self.unknown.add(how)
            logger.warning("In %s of several requests it is not known which row of the model's input belongs to which, "
                           "because %s. Their answers are what they were, without X-Early-Exit headers, and "
                           "their records name no request", batches, because)


class DrawnRequest:
    """A request of a batch that is to be checked, and what the model is called with for the batch."""

    def __init__(self, position: int, call: Call) -> None:
        self.position = position
        # A handler may change what it is given.
        self.call = copy.deepcopy(call)
        self._batch: list[Rows] = []

    def keep(self, inputs: Live) -> None:
        """Keep the inputs of a call of the model, where there is memory for them; never raises."""
        with suppress(Exception):
            self._batch.append(copied(inputs))

    def rows(self, owners: Sequence[Sequence[int]]) -> Rows | None:
        """Return the rows of the request, or None where the model was called with others than those owned."""
        batch = joined(self._batch)
        of_row = [owner for of_call in owners for owner in of_call]
        if batch is None or len(batch[0]) != len(of_row):
            return None
        own = [row for row, owner in enumerate(of_row) if owner == self.position]
        return tuple(x[own] for x in batch)


class RowCheck:
    """Checks the first batch of several requests, the second with a chance of 1/2, and so on to one in 1,000.

    Two requests, as `ee-archive` has, do not show that a handler orders its batch by something in which they are equal,
    such as their length. What is wrong with a handler of that kind shows in most of its batches, so soon.
    """

    def __init__(self, model: EarlyExitModel, handler: UserHandler, context: HandlerContext, ownership: RowOwnership,
                 random: Random | None = None) -> None:
        """Begin.

        Args:
            model: what the handler calls.
            handler: the user's.
            context: the handler's.
            ownership: what is known, and is contradicted where it is wrong.
            random: draws batches and requests.
        """
        self._model, self._handler, self._context, self._ownership = model, handler, context, ownership
        self._random = random or Random()
        self._n_batches = 0

    def draw(self, calls: Sequence[Call]) -> DrawnRequest | None:
        """Return the request of a batch that is to be checked, or None where the batch is not."""
        if len(calls) == 1 or self._ownership.rows_per_request is None or share_instances(calls):
            return None
        self._n_batches += 1
        if self._random.random() * min(self._n_batches, _ONE_IN) >= 1:
            return None
        position = self._random.randrange(len(calls))
        with suppress(Exception):  # some inputs cannot be copied, such as what a client has nested too deeply
            return DrawnRequest(position, calls[position])
        return None

    def check(self, drawn: DrawnRequest, served: Served) -> bool:
        """Tell whether what was known still is, after a look at the rows of the request alone; never raises.

        Args:
            drawn: of the batch.
            served: the whole batch.
        """
        with suppress(Exception):  # such as too little memory, of which the answers need not know
            in_batch = drawn.rows(served.owners or ())
            alone = in_batch and rows_alone(drawn.call, self._handler, self._context, self._model)
            if alone is not None and not is_equal(alone, in_batch):
                self._ownership.contradicted(ANOTHER_ORDER)
                return False
        return True
