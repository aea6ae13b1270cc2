"""Two requests, handled together and separately, show which of a handler's rows belong to which request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from early_exit.handler.user_handler.rows import RowsPerRequest, is_equal, rows_per_request

Request = Tensor
"""A request is a tensor of shape (3,)."""
Handler = Callable[[Sequence[Request]], list[tuple[Tensor, ...]]]
"""A handler maps requests to the inputs of its calls of the model."""

FEW = settings(max_examples=15)
REQUESTS = st.lists(st.floats(-100, 100, width=16), min_size=3, max_size=3).map(torch.tensor)


def views(request: Request) -> list[Tensor]:
    """Return three rows of shape (3,) for a request, as test-time augmentation does."""
    return [request, request + 1000, 2 * request + 3000]


def at_once(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return [(torch.stack(list(requests)),)]


def one_by_one(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return [(request[None],) for request in requests]


def several_rows_each(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return [(torch.stack([view for request in requests for view in views(request)]),)]


def several_rows_one_by_one(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return [(torch.stack(views(request)),) for request in requests]


def a_few_rows_at_a_time(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    """Return calls that may begin and end in the middle of a request's rows."""
    [(rows,)] = several_rows_each(requests)
    return [(rows,)] if len(requests) == 1 else [(part,) for part in rows.split(4)]


def with_a_mask(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return [(torch.stack(list(requests)), torch.ones(len(requests), 3, dtype=torch.int64))]


def reversing(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return at_once(list(requests)[::-1])


def sorting(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return at_once(sorted(requests, key=lambda request: request.tolist()))


def one_by_one_in_reverse(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return one_by_one(list(requests)[::-1])


def interleaving(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return [(torch.stack([view for same_view in zip(*map(views, requests)) for view in same_view]),)]


def reversing_all_rows(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return [(several_rows_each(requests)[0][0].flip(0),)]


def calling_twice(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return at_once(requests) + at_once([request.flip(0) for request in requests])


def calling_twice_for_one(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return calling_twice(requests) if len(requests) == 1 else at_once(requests)


def padding_to_a_fixed_batch(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return at_once([*requests, *[torch.zeros(3)] * (8 - len(requests))])


def padding_to_the_longest(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return [(torch.nn.functional.pad(torch.stack(list(requests)), (0, len(requests))),)]


def mixing(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    rows = torch.stack(list(requests))
    return [(rows - rows.mean(dim=0),)]


def repeating_the_batch(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return at_once([*requests, *(request + 1000 for request in requests)])


def without_an_answer_of_the_model(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
    return []


def found(handler: Handler, a: Request, b: Request) -> RowsPerRequest:
    return rows_per_request(handler([a]), handler([b]), handler([a, b]), handler([b, a]))


@pytest.mark.parametrize(("handler", "count"), [
    (at_once, 1), (one_by_one, 1), (with_a_mask, 1), (several_rows_each, 3), (several_rows_one_by_one, 3),
    (a_few_rows_at_a_time, 3)])
@FEW
@given(a=REQUESTS, b=REQUESTS)
def test_rows_in_the_order_of_the_requests_are_counted(handler: Handler, count: int, a: Request, b: Request) -> None:
    assume(not torch.allclose(a, b, rtol=1e-3, atol=0.1))
    assert found(handler, a, b) == RowsPerRequest(count)


@pytest.mark.parametrize("handler", [
    reversing, sorting, one_by_one_in_reverse, interleaving, reversing_all_rows, calling_twice, calling_twice_for_one,
    padding_to_a_fixed_batch, padding_to_the_longest, mixing, repeating_the_batch, without_an_answer_of_the_model])
@FEW
@given(a=REQUESTS, b=REQUESTS)
def test_every_other_order_or_number_is_unknown(handler: Handler, a: Request, b: Request) -> None:
    assume(not torch.allclose(a, b, rtol=1e-3, atol=0.1))
    assert found(handler, a, b).count is None
    assert found(handler, a, b).unknown_because


def test_requests_whose_difference_is_lost_beside_other_rows_show_no_order() -> None:
    """Each has rows of its own, but beside rows of 3,000 their difference is no larger than what rounding may do."""
    a, b = torch.zeros(3), torch.tensor([0.02, 0.0, 0.0])
    for handler in (several_rows_each, reversing_all_rows):
        assert "give two requests that differ" in found(handler, a, b).unknown_because


@FEW
@given(rows=st.lists(REQUESTS, min_size=2, max_size=4), seed=st.integers(0, 2**32))
def test_a_handler_that_shuffles_is_known_only_by_chance_and_then_rightly(rows: list[Request], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    a, b = (torch.stack(rows[half:half + len(rows) // 2]) for half in (0, len(rows) // 2))

    def shuffled(*requests: Tensor) -> Tensor:
        batch = torch.cat(requests)
        return batch[torch.randperm(len(batch), generator=random)]

    ab, ba = shuffled(a, b), shuffled(b, a)
    if rows_per_request([(a,)], [(b,)], [(ab,)], [(ba,)]).count is not None:
        assert is_equal((ab,), (torch.cat([a, b]),)) and is_equal((ba,), (torch.cat([b, a]),))


@FEW
@given(request=REQUESTS)
def test_samples_that_look_alike_tell_nothing(request: Request) -> None:
    assert "give two requests that differ" in found(at_once, request, request.clone()).unknown_because


def test_a_filter_of_duplicates_is_found_out_by_two_requests_that_share_rows() -> None:
    def filtering(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
        return [(torch.unique(torch.cat(list(requests)), dim=0),)]

    a, b = torch.tensor([[0.0, 1], [2, 3]]), torch.tensor([[0.0, 1], [4, 5]])
    assert found(filtering, a, b).unknown_because == "the handler makes 2 rows of one request and 3 of two"


def test_requests_of_different_numbers_of_rows_are_unknown() -> None:
    def sentences(requests: Sequence[Request]) -> list[tuple[Tensor, ...]]:
        return [(torch.cat(list(requests)),)]

    answer = found(sentences, torch.randn(2, 3), torch.randn(3, 3))
    assert answer.unknown_because == "the handler makes 2 rows of one request and 3 of another"


def test_rounding_is_no_difference_and_a_dtype_is() -> None:
    x = torch.randn(5, 3)
    assert is_equal((x,), (x * (1 + 1e-6),))
    assert not is_equal((x,), (x * 1.01,))
    assert not is_equal((x,), (x.double(),))
    nan = torch.tensor([[float("nan"), float("inf"), 1.0]])
    assert is_equal((nan,), (nan.clone(),)) and not is_equal((nan,), (torch.tensor([[1.0, float("inf"), 1.0]]),))
