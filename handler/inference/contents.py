"""The lists, dicts and sets that a handler keeps: of several calls that wait in turn, each has its own contents."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from operator import is_
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor

from early_exit.handler.inference.containers import CONTAINERS, HOLDERS, base_of, copied, is_same, put

_PLAIN = frozenset({str, bytes, int, float, complex, bool, type(None), type, ModuleType, FunctionType, Tensor})
"""Types of values that contain no container. Most values have one of these, so they are told apart first."""

_Held = Mapping[int, tuple[Any, Any]]
"""Containers, each with a copy of its content, by the identity of the container."""


class KeptContents:
    """Lets each call of a handler keep what it has put into a container, while other calls run.

    What a call puts into a container is seen by calls that begin after its end. What it takes out is gone for all at
    once, so that no two calls take the same item from a stock, and no item comes back that a thread of the handler has
    taken from a queue.
    """

    def __init__(self, roots: Callable[[], Iterable[object]], is_helper: Callable[[object], bool]) -> None:
        """Begin without calls.

        Args:
            roots: returns the values from which all containers are reached.
            is_helper: tells whether the attributes of an object are also searched.
        """
        self._roots, self._is_helper = roots, is_helper
        self._reached: dict[int, _Reached] = {}
        """What each root reached when it was last asked for, by the identity of the root."""
        self._pairs: _Held = {}
        self._call = threading.local()
        self._waiting: set[_Progress] = set()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Run a call of the handler inside the block."""
        now = self._now({})
        self._call.progress = progress = _Progress(dict(now), dict(now), now)
        try:
            yield
        finally:
            own = self._now({**progress.shared, **progress.first})
            progress.stop(own, self._waiting)
            for key, pair in progress.shared.items():
                if progress.first.get(key) is not own[key] or own[key] is not pair:
                    put(pair[0], progress.with_added(key, *pair, own))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let other calls run inside the block; a call of the handler enters it while it waits."""
        progress: _Progress = self._call.progress
        own = progress.own = dict(self._now({**progress.shared, **progress.first}))
        progress.stop(own, self._waiting)
        left = progress.shared
        for key, (container, content) in left.items():
            if own[key][1] is not content:
                put(container, content)
        self._waiting.add(progress)
        try:
            yield
        finally:
            self._waiting.remove(progress)
            now = self._now(left)
            progress.shared, progress.before = dict(now), dict(own)
            for key, (container, content) in own.items():
                if now.get(key) is not own[key]:
                    content = progress.go_on(key, *own[key], left.get(key), now)
                    progress.before[key] = container, content
                    put(container, content)

    def _now(self, also: _Held) -> _Held:
        """Return all containers that the roots reach, and those in `also`, with their contents.

        The copy of a container that is as it was is the same object as before.
        """
        held: dict[int, tuple[Any, Any]] = {}
        reached: dict[int, _Reached] = {}
        for root in self._roots():
            if type(root) not in _PLAIN:
                known = self._reached.get(id(root))
                if known is None or not known.is_unchanged():
                    known = _Reached(root, self._walk(root))
                reached[id(root)] = known
                held.update(known.held)
        held.update({key: pair if is_same(*pair) else (pair[0], copied(pair[0]))
                     for key, pair in also.items() if key not in held})
        self._reached, self._pairs = reached, held
        return held

    def _walk(self, root: object) -> _Held:
        held: dict[int, tuple[Any, Any]] = {}
        waiting, seen = deque([root]), set[int]()
        while waiting:
            value: Any = waiting.popleft()
            if id(value) in seen:
                continue
            seen.add(id(value))
            inner: Iterable[object] = ()
            if type(value) not in CONTAINERS and (isinstance(value, HOLDERS) or self._is_helper(value)):
                waiting.append(vars(value))
            if isinstance(value, CONTAINERS):
                pair = self._pairs.get(id(value))
                pair = held[id(value)] = pair if pair is not None and is_same(*pair) else (value, copied(value))
                # A thread of the handler may change the container itself at any time, but not the copy.
                inner = pair[1].values() if isinstance(value, dict) else pair[1]
            elif isinstance(value, tuple):
                inner = value
            waiting.extend([one for one in inner if type(one) not in _PLAIN])
        return held


class _Progress:
    """What a call has done to the containers."""

    def __init__(self, first: dict[int, tuple[Any, Any]], shared: dict[int, tuple[Any, Any]], before: _Held) -> None:
        self.first = first
        """The contents at the begin of the call, without what it has taken out."""
        self.shared = shared
        """The contents that other calls see, without what this call has taken out."""
        self.before = before
        """The contents when the call began or continued."""
        self.own: dict[int, tuple[Any, Any]] = {}
        """The contents with which the call waits."""
        self._refilled: set[int] = set()
        """Lists in whose places the call has put other items."""

    def stop(self, own: _Held, others: Iterable[_Progress]) -> None:
        """Note what the call has taken out since it began or continued.

        Args:
            own: the contents now.
            others: the calls that wait; they do not find an item either that was taken from a list as they know it.
        """
        for key, (container, before) in self.before.items():
            _, after = own.get(key, (None, before))
            if before is after or is_same(before, after):
                continue
            if _is_refilled(container, before, after):
                self._refilled.add(key)
                continue
            unaware = [other for other in others if isinstance(container, list) and other.has_not_changed(key)]
            for contents in (self.first, self.shared, *chain.from_iterable(
                    (other.first, other.shared, other.own) for other in unaware)):
                if key in contents:
                    contents[key] = container, _without(container, contents[key][1], before, after)

    def has_not_changed(self, key: int) -> bool:
        """Tell whether a call that waits knows a container and has not changed it."""
        return key in self.own and key in self.first and is_same(self.own[key][1], self.first[key][1])

    def go_on(self, key: int, container: Any, own: Any, left: tuple[Any, Any] | None, now: _Held) -> Any:
        """Return the content with which a call continues: its own, without what others have taken out of a container
        that this call has not changed, or out of a queue or a cache. What it has set in a cache itself stays."""
        if left is None or not (isinstance(container, (deque, OrderedDict)) or self.has_not_changed(key)):
            return own
        before, after = left[1], now[key][1]
        if before is after or _is_refilled(container, before, after):
            return own
        kept, first = _without(container, own, before, after), self.first.get(key, (None, own))[1]
        if key in self.first:
            self.first[key] = container, _without(container, first, before, after)
        return {name: value for name, value in own.items() if name in kept or first.get(name, self) is not value
                } if isinstance(container, dict) else kept

    def with_added(self, key: int, container: Any, content: Any, own: _Held) -> Any:
        """Return a content with what the call has added to it."""
        if key not in self.first:
            return content
        (_, first), (_, last) = self.first[key], own[key]
        if first is last or is_same(first, last):
            return content
        if is_same(first, content) or (key in self._refilled and len(content) == len(first)):
            return last
        if key in self._refilled:  # other calls change the length, so this one has taken items out and added others
            first, content = (_without(container, one, first, last) for one in (first, content))
        return _merged(container, first, last, content)


class _Reached:
    """What was reached from a root. It compares all contents at once, because most handlers keep thousands of values,
    such as the names of classes, and change none."""

    def __init__(self, root: object, held: _Held) -> None:
        self.root, self.held = root, held
        # Compared with the copies, because a thread of the handler may have changed the containers since.
        self._sets = [pair for pair in held.values() if isinstance(pair[0], set)]
        pairs = [pair for pair in held.values() if not isinstance(pair[0], set)]
        dicts = [pair for pair in pairs if isinstance(pair[0], dict)]
        self._containers = [container for container, _ in pairs]
        self._dict_values = [base_of(container).values(container) for container, _ in dicts]
        self._lengths = [len(content) for _, content in pairs]
        self._entries = [*chain.from_iterable(content for _, content in pairs)]
        self._values = [*chain.from_iterable(content.values() for _, content in dicts)]

    def is_unchanged(self) -> bool:
        """Tell whether all containers hold the same objects as before."""
        return all(is_same(*pair) for pair in self._sets) and (
            [*map(len, self._containers)] == self._lengths
            and all(map(is_, chain.from_iterable(self._containers), self._entries))
            and all(map(is_, chain.from_iterable(self._dict_values), self._values)))


def _merged(container: Any, first: Any, last: Any, content: Any) -> Any:
    """Return a content with what has been added to another one, the first, to make it the last."""
    if isinstance(container, set):
        return content | (last - first)
    if isinstance(container, dict):
        return _merged_dicts(first, last, content)
    n_old = Counter(map(id, first))
    is_new = [not _counts_down(n_old, item) for item in last]
    n_before = is_new.index(False) if False in is_new else 0
    return [*last[:n_before], *content, *(item for item, new in zip(last[n_before:], is_new[n_before:]) if new)]


def _merged_dicts(first: dict[Any, Any], last: dict[Any, Any], content: dict[Any, Any]) -> dict[Any, Any]:
    merged, places, furthest = dict(content), {name: place for place, name in enumerate(first)}, -1
    for name, value in last.items():
        place = places.get(name, -1)
        is_set = name not in first or first[name] is not value
        if place < furthest and (is_set or name in merged):  # it is new, or was moved to the end
            value = value if is_set else merged[name]
            merged.pop(name, None)
            merged[name] = value
        elif is_set:
            merged[name] = value
        furthest = max(furthest, place)
    return merged


def _is_refilled(container: Any, before: Any, after: Any) -> bool:
    """Tell whether other items were put in the same places of a list."""
    return isinstance(container, list) and len(before) == len(after)


def _without(container: Any, content: Any, before: Any, after: Any) -> Any:
    """Return a content without what was taken out of its container between two moments."""
    if isinstance(container, dict):
        gone = before.keys() - after.keys()
        return {key: value for key, value in content.items() if key not in gone}
    if isinstance(container, set):
        return content - (before - after)
    if len(before) <= len(after) and all(map(is_, before, after)):  # only appended to
        return content
    n_gone = Counter(map(id, before)) - Counter(map(id, after))
    return [item for item in content if not _counts_down(n_gone, item)]


def _counts_down(counts: Counter[int], item: object) -> bool:
    counts[id(item)] -= 1
    return counts[id(item)] >= 0
