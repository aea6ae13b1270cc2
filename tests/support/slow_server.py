"""A server of models on which every call takes time, for rolls that run at the same time."""

from __future__ import annotations

import json
import random
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from early_exit.archiver.control import Claim, RunSettings, VersionStatus
from early_exit.archiver.packaging.registered import registered_archive
from early_exit.handler.archive_layout import MANIFEST
from early_exit.handler.errors import ServerError
from tests.support.server_in_memory import ServerInMemory
from tests.support.virtual_clock import VirtualClock


def plain_mar(store: Path, version: str, *, config: str | None = None, model: str = "digits") -> Path:
    """Write an archive as torch-model-archiver does, as far as it matters to a roll; return its path."""
    described = {"modelName": model, "modelVersion": version, "handler": "handler.py"}
    mar = store / f"{model}-{version}.mar"
    with zipfile.ZipFile(mar, "w") as archive:
        if config is not None:
            described["configFile"] = "model-config.yaml"
            archive.writestr("model-config.yaml", config)
        archive.writestr(MANIFEST, json.dumps({"runtime": "python", "model": described}))
        archive.writestr("handler.py", "def handle(data, context):\n    return ['{}'] * len(data or [])\n")
    return mar


@dataclass
class SlowServer(ServerInMemory):
    """A server on which a call takes effect after a random time, and is answered after another random time.

    What TorchServe 0.12 does in several steps takes several steps here: listing versions, and the first registration of
    a model.
    """

    clock: VirtualClock = field(default_factory=VirtualClock)
    draw: random.Random = field(default_factory=random.Random)
    most_s: float = 0.0
    """The longest time from a call to its effect, and from its effect to its answer."""
    ready_s: float = 0.0
    """The longest time that workers need to start."""
    ready_at: dict[Claim | None, float] = field(default_factory=dict)

    def versions(self, model: str) -> list[VersionStatus]:
        self._pass()
        default = next((status.version for status in super().versions(model) if status.is_default), None)
        self._pass()
        found = [replace(status, is_default=status.version == default,
                         n_ready=status.n_ready if self.clock.now() >= self.ready_at.get(status.claim, 0.0) else 0)
                 for status in super().versions(model)]
        self._pass()
        return found

    def register(self, file_name: str, settings: RunSettings, *, model: str | None = None,
                 claim: Claim | None = None) -> None:
        self._pass()
        self.ready_at[claim] = self.clock.now() + self.draw.uniform(0, self.ready_s)
        archive = registered_archive(self.store / file_name)
        model = model or archive.model
        if model in self.all:
            super().register(file_name, settings, model=model, claim=claim)
        else:
            first = self.added({}, file_name, settings, claim)
            self._pass()  # another first registration may also get here
            self.all.setdefault(model, first)
            if archive.version not in self.all[model]:
                raise ServerError("the version does not exist")
        self._pass()

    def set_default(self, model: str, version: str, *, limit_s: float) -> None:
        self._pass(limit_s)
        super().set_default(model, version, limit_s=limit_s)
        self._pass()

    def unregister(self, model: str, version: str) -> None:
        self._pass()
        super().unregister(model, version)
        self._pass()

    def scale(self, model: str, version: str, workers: tuple[int, int]) -> None:
        self._pass()
        super().scale(model, version, workers)
        self._pass()

    def _pass(self, limit_s: float = float("inf")) -> None:
        seconds: Any = self.draw.uniform(0, self.most_s)
        self.clock.sleep(min(seconds, limit_s))
        if seconds > limit_s:
            raise ServerError("no answer in time")
