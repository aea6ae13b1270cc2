"""What the plan in an archive promises."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.errors import FormatError, PlanError
from early_exit.handler.exits.plan import ExitPlan
from early_exit.handler.monitor.sequential_test import Monitored


class Promises:
    """The plans of the archives in a model store, each read once."""

    def __init__(self, store: Path | None) -> None:
        self._store = store
        self._read: dict[tuple[str, int], dict[str, Any] | None] = {}

    def of(self, url: str) -> dict[str, Any] | None:
        """Return what the live page tells of a plan.

        Args:
            url: of an archive, as TorchServe names it.

        Returns:
            None where the archive has no plan or cannot be read here.
        """
        mar = self._store / url.rpartition("/")[2] if self._store else None
        try:
            if mar is None or not mar.is_file():
                return None
            key = (mar.name, mar.stat().st_mtime_ns)
            if key not in self._read:
                self._read[key] = _read(mar)
            return self._read[key]
        except OSError:
            return None


def _read(mar: Path) -> dict[str, Any] | None:
    try:
        with zipfile.ZipFile(mar) as archive:
            plan = ExitPlan.from_json(json.loads(archive.read(ArchiveLayout(Path()).plan.as_posix())), str(mar))
    except (KeyError, ValueError, PlanError, FormatError, zipfile.BadZipFile):  # without a plan, or none of ours
        return None
    certificate = plan.certificate
    return {
        "exits": [{"layer": one.layer, "cost": one.cost, "head_cost": one.head_cost, "threshold": one.threshold}
                  for one in plan.exits],
        "safer": plan.safer, "measure": plan.measure, "expected_cost": plan.expected_cost,
        "certificate": None if certificate is None else {**asdict(certificate), "words": certificate.in_words()},
        "watched": None if certificate is None else asdict(Monitored.of(certificate))}
