"""How many of the certificates whose plans were measured did not hold on the measured requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LOSSES = {"disagreement": "disagreement", "accuracy": "accuracy_loss"}
"""The column of what a row lost, by the risk that its budget is for. A row does not measure the confidence gap."""


def certificates(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the number `n` of certified plans with exits, the number `broken` of those that lost more than certified,
    and by how many percentage points the worst of them did, `excess_points`.

    The table of all methods does not count: all its certificates are of one network and of the same records.
    """
    excess = [lost - allowed for name, result in results.items() for lost, allowed in measured(name, result)]
    broken = [one for one in excess if one > 0]
    return {"n": len(excess), "broken": len(broken), "excess_points": 100 * max(broken, default=0.0)}


def in_words(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the sentences of the page about its certificates."""
    found = certificates(results)
    return (f"The tables of this page have {found['n']} certificates of plans that let requests leave early, those of "
            f"the table of all methods not counted. {found['broken']} of them did not hold on the measured requests, "
            f"by at most {found['excess_points']:.1f} percentage points. They are not {found['n']} independent draws: "
            "all networks on CIFAR-10 are certified with the same records.")


def measured(name: str, result: Mapping[str, Any]) -> Iterator[tuple[float, float]]:
    """Yield what each certified plan of a result file lost, and what its certificate allows."""
    if name in ("demo", "loop") and result["certificate"]:
        yield result["disagreement"], result["certified_bound"]
    elif name == "int8":
        tolerance = result["run"]["settings"]["tolerance"]
        yield from ((row["disagreement"], tolerance) for row in result["rows"] if row["certificate"])
    elif name.startswith("paper"):
        yield from ((row[LOSSES[row["risk"]]], row["tolerance"]) for row in result["rows"]
                    if row.get("certificate") and row["risk"] in LOSSES and row["hits"]["full"] < 1)


def did_not_hold(row: Mapping[str, Any]) -> bool:
    """Tell whether a row with a method lost more than its certificate allows. 5 % of certificates may be false."""
    return bool(row["certificate"]) and row["risk"] in LOSSES and row[LOSSES[row["risk"]]] > row["tolerance"]
