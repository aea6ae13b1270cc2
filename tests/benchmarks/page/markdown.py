"""Markdown tables of figures that were read from JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LONGEST = 12
"""The length of the longest list of numbers that a cell shows."""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("|" + "|".join(cells) + "|" if number == 1 else "| " + " | ".join(cells) + " |"
                     for number, cells in enumerate(lines))


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share in [0, 1] in percent. A value that is rounded to zero has no sign.

    >>> percent(0.0132), percent(-0.0002), percent(0.785, digits=0)
    ('1.3 %', '0.0 %', '78 %')
    """
    if value is None:
        return ""
    number = f"{100 * value:.{digits}f}"
    return f"{number.lstrip('-') if float(number) == 0 else number} %"


def by_batch(ratios: Mapping[str, float]) -> str:
    """Return the ratios of all batch sizes, in the order of the sizes.

    >>> by_batch({"1": 0.98, "32": 0.7, "8": 0.75})
    '0.98 / 0.75 / 0.70'
    """
    return " / ".join(ratio(ratios[size]) for size in sorted(ratios, key=int))


def in_words(value: Any) -> str:
    """Return any figure as the text of a cell."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        return ", ".join(map(in_words, value)) or "none"
    return " ".join(str(value).replace("|", "/").split())


def flat(figures: Mapping[str, Any]) -> dict[str, str]:
    """Return figures as text by name. Nested figures have the name of the whole first; long lists are left out.

    >>> flat({"p50_ms": {"quiet": 3.0}, "rows": [{"a": 1}]})
    {'p50 ms, quiet': '3'}
    """
    found: dict[str, str] = {}
    for key, value in figures.items():
        name = key.replace("_", " ")
        if isinstance(value, dict):
            found |= {f"{name}, {inner}": text for inner, text in flat(value).items()}
        elif not isinstance(value, list) or (len(value) <= LONGEST and not any(
                isinstance(one, (dict, list)) for one in value)):
            found[name] = in_words(value)
    return found


def any_figures(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield tables of any benchmark's figures: one table of the single figures, and one for each list of rows."""
    single = flat(figures)
    if single:
        yield table(["figure", "value"], [[name, value] for name, value in single.items()])
    for key, value in figures.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            rows = [flat(one) for one in value]
            columns = list(dict.fromkeys(name for one in rows for name in one))
            yield f"{key.replace('_', ' ').capitalize()}:"
            yield table(columns, [[one.get(column, "") for column in columns] for one in rows])
