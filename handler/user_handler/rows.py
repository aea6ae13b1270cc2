"""Which rows of the model's input belong to which request: found with two requests, handled together and alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = tuple[Tensor, ...]
"""Some rows of the model's input: (R, ...) tensors, one for each input of the model, in order."""

_RELATIVE, _OF_LARGEST = 1e-4, 1e-5
"""The tolerances for equal values, relative to the value and to the largest value: pre-processing of several requests
at once rounds differently than pre-processing of one request. The second tolerance is for values near 0 that are the
difference of larger values."""
ANOTHER_ORDER = ("the rows that the handler makes of several requests at once are not those that it makes of each "
                 "alone, in the order of the requests: it reorders, mixes or changes them")
"""The reason if rows of several requests differ from those of each request alone."""


@dataclass(frozen=True)
class RowsPerRequest:
    """How the rows of the model's input belong to requests."""

    count: int | None
    """The number of rows that each request becomes, side by side in the order of the requests; None if not known."""
    unknown_because: str = ""
    """The reason why it is not known, as a clause that can follow 'because'."""


def rows_per_request(a: Sequence[Rows], b: Sequence[Rows], ab: Sequence[Rows], ba: Sequence[Rows]) -> RowsPerRequest:
    """Return how rows belong to requests, from the inputs of a handler's calls of its model for two different requests.

    The handler may call its model once for all requests, once for each, or for a few at a time, as long as all rows
    together follow the order of the requests. If a handler orders requests by a property that is equal for both, such
    as their length, this is not detected.

    Args:
        a: the calls of the model for the first request alone, in order.
        b: the calls for the second request alone.
        ab: the calls for both requests at once.
        ba: the calls for both requests at once, in the opposite order.

    >>> cat, dog = torch.zeros(1, 3), torch.ones(1, 3)
    >>> rows_per_request([(cat,)], [(dog,)], [(cat,), (dog,)], [(torch.cat([dog, cat]),)]).count
    1
    """
    for alone in (a, b):
        if len(alone) != 1:
            return called_often(len(alone))
    of_a, of_b = a[0], b[0]
    n_rows = n_rows_of(of_a)
    if not n_rows or n_rows_of(of_b) != n_rows:
        return RowsPerRequest(None, f"the handler makes {n_rows} rows of one request and {n_rows_of(of_b)} of another")
    if not (_has_a_row_of_its_own(of_a, of_b) and _has_a_row_of_its_own(of_b, of_a)) or (
            is_equal(joined([of_a, of_b]), joined([of_b, of_a]))):  # as where one row is large and another small
        return RowsPerRequest(None, "the handler makes the same rows of both sample requests, so they do not show "
                                    "which row belongs to which request: give two requests that differ")
    for both, first, second in ((ab, of_a, of_b), (ba, of_b, of_a)):
        n_of_both = sum(map(n_rows_of, both))
        if n_of_both != 2 * n_rows:
            return RowsPerRequest(None, f"the handler makes {n_rows} rows of one request and {n_of_both} of two")
        if not is_equal(joined(both), joined([first, second])):
            return RowsPerRequest(None, ANOTHER_ORDER)
    return RowsPerRequest(n_rows)


def called_often(n_calls: int) -> RowsPerRequest:
    """Return the result for a handler that calls its model several times for one request, or never."""
    return RowsPerRequest(None, f"the handler calls its model {n_calls} times for one request")


def n_rows_of(rows: Rows) -> int:
    """Return the number of rows."""
    return len(rows[0])


def joined(calls: Sequence[Rows]) -> Rows | None:
    """Concatenate the rows of several calls of the model, or return None if their dtypes or shapes differ."""
    kinds = {tuple((x.dtype, x.shape[1:]) for x in rows) for rows in calls}
    return tuple(map(torch.cat, zip(*calls))) if len(kinds) == 1 else None


def is_equal(found: Rows | None, expected: Rows | None) -> bool:
    """Tell whether rows are equal in number, shape, dtype and, up to rounding, values; None is never equal."""
    if found is None or expected is None or len(found) != len(expected):
        return False
    return all(x.shape == y.shape and x.dtype == y.dtype and _is_close(x, y) for x, y in zip(found, expected))


def _is_close(x: Tensor, y: Tensor) -> bool:
    if not x.is_floating_point():
        return torch.equal(x, y)
    finite = y[y.isfinite()].abs().double()
    scale = finite.max().item() if len(finite) else 0.0
    return torch.allclose(x.double(), y.double(), rtol=_RELATIVE, atol=_OF_LARGEST * scale, equal_nan=True)


def _has_a_row_of_its_own(rows: Rows, others: Rows) -> bool:
    """Tell whether at least one of the rows is not among the others."""
    def row(of: Rows, number: int) -> Rows:
        return tuple(x[number:number + 1] for x in of)

    return any(not any(is_equal(row(rows, here), row(others, there)) for there in range(n_rows_of(others)))
               for here in range(n_rows_of(rows)))
