"""Dicts, lists, sets and deques, read and written as they are, also if their own classes do something else with it."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, deque
from contextlib import suppress
from operator import eq, is_
from types import SimpleNamespace
from typing import Any

CONTAINERS = (OrderedDict, dict, list, set, deque)
HOLDERS = (SimpleNamespace, Namespace, UserDict, UserList)
"""Types of the standard library whose objects keep everything in their attributes."""
_BASES: dict[type, Any] = {kind: kind for kind in CONTAINERS}


def base_of(container: Any) -> Any:
    """Return the type whose methods read and write a container as it is, even if its own class has others."""
    return _BASES.get(type(container)) or next(base for base in CONTAINERS if isinstance(container, base))


def copied(container: Any) -> Any:
    """Return a dict, list or set with the content of a container, in its order; a list for a deque."""
    base = base_of(container)
    if issubclass(base, dict):
        return dict(base.items(container))
    return (set if base is set else list)(base.__iter__(container))


def is_same(container: Any, content: Any) -> bool:
    """Tell whether a container holds the same objects as a copy, in the same order."""
    base = base_of(container)
    if base is set:  # the items of a copy may come in another order
        return bool(set.__eq__(container, content))
    return base.__len__(container) == len(content) and all(map(is_, base.__iter__(container), content)) and (
        not issubclass(base, dict) or all(map(is_, base.values(container), content.values())))


def put(container: Any, content: Any) -> None:
    """Give a container the content of a copy. A thread of the handler that reads meanwhile finds what stays."""
    base = base_of(container)
    if is_same(container, content):
        return
    if base is list:
        list.__setitem__(container, slice(None), content)
    elif base is set:
        set.intersection_update(container, content)
        set.update(container, content)
    elif base is deque:
        deque.clear(container)
        deque.extend(container, content)
    else:
        _set_items(base, container, content)
        if base.__len__(container) > len(content):
            for name in base.keys(container) - content.keys():
                with suppress(KeyError):
                    base.__delitem__(container, name)
        if not all(map(eq, base.__iter__(container), content)):  # the same keys in another order
            base.clear(container)
            _set_items(base, container, content)


def _set_items(base: Any, container: Any, content: Any) -> None:
    if base is dict:
        dict.update(container, content)
    else:
        for name, value in content.items():
            base.__setitem__(container, name, value)
