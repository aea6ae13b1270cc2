"""The lists, dicts and sets that a handler keeps: of several calls that wait in turn, each has its own contents."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from operator import is_
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor

_CONTAINERS = (dict, list, set, deque)
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

    @contextmanager
    def call(self) -> Iterator[None]:
        """Run a call of the handler inside the block."""
        now = self._now({})
        self._call.progress = progress = _Progress(dict(now), dict(now), now)
        try:
            yield
        finally:
            own = self._now({**progress.shared, **progress.first})
            progress.stop(own)
            for key, pair in progress.shared.items():
                if progress.first.get(key) is not own[key] or own[key] is not pair:
                    _put(pair[0], progress.with_added(key, *pair, own))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let other calls run inside the block; a call of the handler enters it while it waits."""
        progress: _Progress = self._call.progress
        own = self._now({**progress.shared, **progress.first})
        progress.stop(own)
        left = progress.shared
        for key, (container, content) in left.items():
            if own[key][1] is not content:
                _put(container, content)
        try:
            yield
        finally:
            now = self._now(left)
            progress.shared, progress.before = dict(now), dict(own)
            for key, (container, content) in own.items():
                if now.get(key) is not own[key]:
                    content = _taken_up_again(container, content, left.get(key), now)
                    progress.before[key] = container, content
                    _put(container, content)

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
        held.update({key: pair if _is_same(*pair) else (pair[0], _copied(pair[0]))
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
            is_content = isinstance(value, (*_CONTAINERS, tuple))
            if isinstance(value, SimpleNamespace) or (not is_content and self._is_helper(value)):
                value = vars(value)
                seen.add(id(value))
            if isinstance(value, _CONTAINERS):
                pair = self._pairs.get(id(value))
                pair = held[id(value)] = pair if pair is not None and _is_same(*pair) else (value, _copied(value))
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
        self._refilled: set[int] = set()
        """Lists in whose places the call has put other items."""

    def stop(self, own: _Held) -> None:
        """Note what the call has taken out since it began or continued; `own` are the contents now."""
        for key, (container, before) in self.before.items():
            _, after = own.get(key, (None, before))
            if before is after or _is_same(before, after):
                continue
            if _is_refilled(container, before, after):
                self._refilled.add(key)
                continue
            for contents in (self.first, self.shared):
                if key in contents:
                    contents[key] = container, _without(container, contents[key][1], before, after)

    def with_added(self, key: int, container: Any, content: Any, own: _Held) -> Any:
        """Return a content with what the call has added to it."""
        if key not in self.first:
            return content
        (_, first), (_, last) = self.first[key], own[key]
        if first is last:
            return content
        if key in self._refilled:
            return last
        if isinstance(container, dict):
            return {**content, **{name: value for name, value in last.items()
                                  if name not in first or first[name] is not value}}
        if isinstance(container, set):
            return content | (last - first)
        n_old = Counter(map(id, first))
        return [*content, *(item for item in last if not _counts_down(n_old, item))]


class _Reached:
    """What was reached from a root. It compares all contents at once, because most handlers keep thousands of values,
    such as the names of classes, and change none."""

    def __init__(self, root: object, held: _Held) -> None:
        self.root, self.held = root, held
        self._containers = [container for container, _ in held.values()]
        self._dicts = [container for container in self._containers if isinstance(container, dict)]
        self._lengths = [*map(len, self._containers)]
        self._entries = [*chain.from_iterable(self._containers)]
        self._values = [*chain.from_iterable(map(dict.values, self._dicts))]

    def is_unchanged(self) -> bool:
        """Tell whether all containers hold the same objects as before."""
        return not self._containers or (
            [*map(len, self._containers)] == self._lengths
            and all(map(is_, chain.from_iterable(self._containers), self._entries))
            and all(map(is_, chain.from_iterable(map(dict.values, self._dicts)), self._values)))


def _copied(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else (
        set(container) if isinstance(container, set) else list(container))


def _is_same(container: Any, content: Any) -> bool:
    if isinstance(container, set):  # the items of a copy may come in another order
        return bool(container == content)
    return len(container) == len(content) and all(map(is_, container, content)) and (
        not isinstance(container, dict) or all(map(is_, container.values(), content.values())))


def _put(container: Any, content: Any) -> None:
    if not _is_same(container, content):
        container.clear()
        (container.update if isinstance(container, (dict, set)) else container.extend)(content)


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
    n_gone = Counter(map(id, before)) - Counter(map(id, after))
    return [item for item in content if not _counts_down(n_gone, item)]


def _taken_up_again(container: Any, own: Any, left: tuple[Any, Any] | None, now: _Held) -> Any:
    """Return the content with which a call continues: its own, without what others have taken out of a container that
    this call has not changed, or out of a queue."""
    if left is None or not (isinstance(container, deque) or _is_same(own, left[1])):
        return own
    after = now[id(container)][1]
    return own if left[1] is after or _is_refilled(container, left[1], after) else _without(
        container, own, left[1], after)


def _counts_down(counts: Counter[int], item: object) -> bool:
    counts[id(item)] -= 1
    return counts[id(item)] >= 0
