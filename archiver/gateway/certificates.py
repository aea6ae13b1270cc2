"""The certificates of the plans in a model store, for the live page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from early_exit.handler.archive_contents import read_archive
from early_exit.handler.errors import EarlyExitError
from early_exit.handler.monitor.monitored import Monitored
from early_exit.training.data.traffic import is_of_other_traffic


class Promises:
    """The plans and certificates of the archives in a model store; each archive is read once."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._read: dict[tuple[str, int], dict[str, Any] | None] = {}

    def of(self, file_name: str) -> dict[str, Any] | None:
        """Return what the live page shows of an archive's plan; None if it has no plan or cannot be read here."""
        mar = self._store / Path(file_name).name
        try:
            if not mar.is_file():
                return None
            key = (mar.name, mar.stat().st_mtime_ns)
            if key not in self._read:
                self._read[key] = _read(mar)
            return self._read[key]
        except OSError:
            return None


def _read(mar: Path) -> dict[str, Any] | None:
    try:
        contents = read_archive(mar)
        is_other = is_of_other_traffic(contents)
    except EarlyExitError:  # the archive is not ours, or was made by another version of this software
        return None
    if (plan := contents.plan) is None:
        return None
    certificate = None if is_other else plan.certificate  # nobody leaves early with this plan
    return {
        "exits": [{"layer": planned.layer, "cost": planned.cost, "head_cost": planned.head_cost,
                   "threshold": planned.threshold} for planned in plan.exits],
        "safer": plan.safer, "measure": plan.measure, "expected_cost": plan.expected_cost,
        "is_of_other_traffic": is_other,
        "certificate": None if certificate is None else {**asdict(certificate), "words": certificate.in_words()},
        "watched": None if certificate is None else _watched(Monitored.of(certificate))}


def _watched(monitored: Monitored) -> dict[str, Any]:
    return {"risk": monitored.risk, "tolerance": monitored.tolerance, "delta": monitored.delta}
