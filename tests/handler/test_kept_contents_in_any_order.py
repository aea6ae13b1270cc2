"""Calls in any order of begins, waits and ends: each finds its own contents, and nothing that they leave is lost."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from functools import partial
from itertools import chain
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.handler.inference.coroutine import Coroutine, Coroutines
from early_exit.handler.user_handler.attributes import HandlerAttributes
from early_exit.handler.user_handler.context import HandlerContext, ToolContext
from tests.support.row_handlers import AtOnce

_ACTIONS = ("fact", "forget", "forget all", "cache", "log", "line", "seen", "refill", "recent", "front", "turn",
            "stock", "bag", "count")
_COROUTINES = Coroutines()
"""All tests share them, because they keep the threads that they start."""
_Token = tuple[int, int]
"""What a call puts into a container: its own number and a serial number."""


class Bag(dict[str, Any]):
    """A dict with methods of its own, which keep the order in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self:
            self.order.append(name)
        super().__setitem__(name, value)

    def clear(self) -> None:
        raise AssertionError("no call of the handler has cleared it")

    update = clear  # type: ignore[assignment]


class Keeping(AtOnce):
    """A handler that keeps every kind of container."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity())  # type: ignore[arg-type]
        self.facts: dict[str, _Token] = {}
        self.cache: dict[str, _Token] = {}
        self.log: list[_Token] = []
        self.line: deque[_Token] = deque()
        self.seen: set[_Token] = set()
        self.refilled: list[_Token] = []
        self.recent: OrderedDict[str, _Token] = OrderedDict()
        self.front, self.ring = list[_Token](), deque(range(3))
        self.stock = [object() for _ in range(20)]
        self.bag = Bag()
        self.counts, self.groups = Counter[str](), defaultdict[str, list[_Token]](list)
        self.deep = ({"log": self.log, "self": [self.facts]},)
        self.deep[0]["deep"] = self.deep

    def tokens(self) -> set[_Token]:
        """Return all that calls have put into containers."""
        return {token for values in (self.facts.values(), self.cache.values(), self.log, self.line, self.seen,
                                     self.front, self.refilled, self.recent.values(), self.bag.values(),
                                     *self.groups.values())
                for token in values}


class Calls:
    """Runs calls of a handler, a part at a time, and checks what each of them finds."""

    def __init__(self, calls: list[list[list[tuple[str, str]]]]) -> None:
        self.handler = Keeping()
        self._attributes = HandlerAttributes(self.handler, HandlerContext(ToolContext("m", "."), {}, {}))
        self._calls = calls
        self._running: dict[int, Coroutine] = {}
        self.ended: list[int] = []
        self.put: dict[int, dict[str, Any]] = {}
        self._taken: dict[int, list[object]] = {}

    def go_on(self, number: int) -> None:
        """Begin a call, or let it continue, until it waits or ends."""
        if number in self._running:
            self._running[number].resume(None)
        else:
            self._running[number] = _COROUTINES.start(lambda: self._run(number))
        if self._running[number].done:
            self._running[number].result()

    def _run(self, number: int) -> None:
        own: dict[str, Any] = {"facts": {}, "cache": {}, "log": [], "refilled": [], "serial": 0}
        self.put[number], self._taken[number] = own, []
        with self._attributes.call():
            for part, actions in enumerate(self._calls[number]):
                if part:
                    with self._attributes.waiting():
                        _COROUTINES.current().ask(None)  # type: ignore[union-attr]
                    self._check(number, own)
                for action, name in actions:
                    own["serial"] += 1
                    self._act(number, action, name, (number, own["serial"]), own)
            self.handler.stock.extend(self._taken.pop(number))
        self.ended.append(number)

    def _check(self, number: int, own: dict[str, Any]) -> None:
        handler = self.handler
        assert {token[0] for token in handler.tokens()} <= {number, *self.ended}, "of no other call in progress"
        assert {name: handler.facts.get(name) for name in own["facts"]} == own["facts"]
        assert {name: handler.cache.get(name) for name in own["cache"]} == own["cache"]
        for kept in (handler.log, handler.line, handler.seen):
            assert [token for token in sorted(kept) if token[0] == number] == own["log"]
        if own["refilled"]:
            assert handler.refilled == own["refilled"]

    def _act(self, number: int, action: str, name: str, token: _Token, own: dict[str, Any]) -> None:
        handler = self.handler
        if action == "fact":
            handler.facts[name] = own["facts"][name] = token
        elif action == "forget":
            handler.facts.pop(name, None)
            own["facts"].pop(name, None)
        elif action == "forget all":
            handler.facts.clear()
            own["facts"].clear()
        elif action == "cache":
            handler.cache[name] = own["cache"][name] = token
        elif action in ("log", "line", "seen"):
            own["log"].append(token)
            handler.log.append(token)
            handler.line.append(token)
            handler.seen.add(token)
        elif action == "refill":
            handler.refilled[:] = own["refilled"] = [token, token]
        elif action == "recent":
            if name in handler.recent:
                handler.recent.move_to_end(name)
            handler.recent[name] = token
            if len(handler.recent) > 2:
                handler.recent.popitem(last=False)
        elif action == "stock":
            taken = handler.stock.pop()
            assert all(taken not in others for others in self._taken.values()), "taken by another call"
            self._taken[number].append(taken)
        elif action == "bag":
            handler.bag[f"{name} {number}"] = token
        elif action == "front":
            handler.front.insert(0, token)
        elif action == "turn":
            handler.ring.rotate(1)
        else:
            handler.counts[name] += 1
            handler.groups[name].append(token)


_PARTS = st.lists(st.lists(st.tuples(st.sampled_from(_ACTIONS), st.sampled_from("abcde")), max_size=4),
                  min_size=2, max_size=3)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_calls_in_any_order_find_their_own_contents_and_lose_nothing(data: st.DataObject) -> None:
    parts = data.draw(st.lists(_PARTS, min_size=2, max_size=4))
    calls = Calls(parts)
    handler = calls.handler
    for number in data.draw(st.permutations([number for number, of_call in enumerate(parts) for _ in of_call])):
        calls.go_on(number)
    everything = sorted(token for own in calls.put.values() for token in own["log"])
    assert sorted(handler.log) == sorted(handler.line) == sorted(handler.seen) == everything
    assert handler.deep[0]["log"] is handler.log
    cache: dict[str, Any] = {}
    for number in calls.ended:
        cache.update(calls.put[number]["cache"])
    assert handler.cache == cache, "as if the calls had come one after another, in the order of their ends"
    assert len(set(map(id, handler.stock))) == len(handler.stock) == 20
    assert type(handler.counts) is Counter and handler.groups.default_factory is list
    assert {type(handler.recent), type(handler.bag), type(handler.line)} == {OrderedDict, Bag, deque}
    for name in [*handler.recent]:
        handler.recent.move_to_end(name)
    assert sorted(handler.bag) == sorted(handler.bag.order)


@settings(max_examples=60, deadline=None)
@given(st.lists(_PARTS, max_size=4))
def test_calls_one_after_another_leave_what_they_leave_without_waits(parts: list[list[list[tuple[str, str]]]]) -> None:
    waiting, at_once = Calls(parts), Calls([[[*chain(*of_call)]] for of_call in parts])
    for number, of_call in enumerate(parts):
        at_once.go_on(number)
        for _ in of_call:
            waiting.go_on(number)
    expected, found = ([[*kept.items()] if isinstance(kept, dict) else kept for kept in (
        handler.facts, handler.cache, handler.log, handler.line, handler.seen, handler.refilled, handler.front,
        handler.ring, handler.recent, handler.bag, handler.bag.order, handler.counts, handler.groups)]
        for handler in (at_once.handler, waiting.handler))
    assert found == expected


def test_a_cache_that_evicts_one_for_each_new_one_stays_bounded_where_calls_wait_in_between() -> None:
    handler = Keeping()
    attributes = HandlerAttributes(handler, HandlerContext(ToolContext("m", "."), {}, {}))

    def call(number: int) -> None:
        with attributes.call():
            handler.recent[str(number)] = (number, 0)
            with attributes.waiting():
                _COROUTINES.current().ask(None)  # type: ignore[union-attr]
            assert handler.recent[str(number)] == (number, 0)
            if len(handler.recent) > 10:
                handler.recent.popitem(last=False)

    running: list[Coroutine] = []
    for number in range(200):
        running.append(_COROUTINES.start(partial(call, number)))
        if len(running) == 4:
            running[0].resume(None)
            running.pop(0).result()
    assert len(handler.recent) < 20
    for one in running:
        one.drop()
