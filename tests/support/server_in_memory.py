"""A server of models that exists only in memory."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from early_exit.archiver.control import Claim, Prediction, RunSettings, VersionStatus
from early_exit.archiver.packaging.registered import registered_archive
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.archive_layout import MANIFEST
from early_exit.handler.errors import ServerError
from early_exit.handler.sample_request import SampleRequest


@dataclass
class ServerInMemory:
    """A server that serves nothing, but knows which versions it would serve, and remembers its calls.

    It chooses and refuses like TorchServe 0.12.
    """

    name: str
    store: Path
    probe_error: str | None = None
    """The error with which every probe fails, if any."""
    has_secret: bool = True
    answer: Prediction = field(default_factory=lambda: Prediction(200, {}, b"{}", None))
    """The answer to every request."""
    all: dict[str, dict[str, VersionStatus]] = field(default_factory=dict)
    """The status of each version, by model and version."""
    calls: list[tuple[str, ...]] = field(default_factory=list)

    def __str__(self) -> str:
        return self.name

    @property
    def registered(self) -> dict[str, VersionStatus]:
        """The versions of the model digits."""
        return self.all.get("digits", {})

    @property
    def default(self) -> str | None:
        return next((version for version, status in self.registered.items() if status.is_default), None)

    def models(self) -> list[str]:
        return list(self.all)

    def versions(self, model: str) -> list[VersionStatus]:
        return list(self.all.get(model, {}).values())

    def named_requests(self, model: str, version: str) -> float | None:
        return None

    def register(self, file_name: str, settings: RunSettings, *, model: str | None = None,
                 claim: Claim | None = None) -> None:
        archive = registered_archive(self.store / file_name)
        self.calls.append(("register", archive.version))
        model = model or archive.model
        self.all[model] = self.added(self.all.get(model, {}), file_name, settings, claim)

    def added(self, versions: dict[str, VersionStatus], file_name: str, settings: RunSettings,
              claim: Claim | None) -> dict[str, VersionStatus]:
        """Return the versions of a model and one more, that of the given archive."""
        archive = registered_archive(self.store / file_name)
        if archive.version in versions:
            raise ServerError(f"Model version {archive.version} is already registered")
        says = archive.configured
        workers = says.workers or settings.workers or (1, 1)
        if says.workers is None:
            workers = (workers[0], workers[0])
        has_file = "configFile" in json.loads(zipfile.ZipFile(self.store / file_name).read(MANIFEST))["model"]
        timeout_s = says.response_timeout_s or (None if has_file else settings.response_timeout_s) or 120
        runs = RunSettings(settings.batch_size or says.batch_size or 1,
                           settings.max_batch_delay_ms or says.max_batch_delay_ms or 100, timeout_s, workers)
        status = VersionStatus(archive.version, not versions, workers[0], workers[0], 0, runs, file_name, claim=claim)
        return {**versions, archive.version: status}

    def scale(self, model: str, version: str, workers: tuple[int, int]) -> None:
        self.calls.append(("scale", version, str(workers)))
        status = self.all[model][version]
        self.all[model][version] = replace(status, n_workers=workers[0], n_ready=workers[0],
                                           settings=replace(status.settings, workers=workers))

    def set_default(self, model: str, version: str, *, limit_s: float) -> None:
        self.calls.append(("set_default", version))
        if version not in self.all.get(model, {}):
            raise ServerError(f"Model version {version} does not exist")
        self.all[model] = {name: replace(status, is_default=name == version)
                           for name, status in self.all[model].items()}

    def unregister(self, model: str, version: str) -> None:
        self.calls.append(("unregister", version))
        versions = self.all.get(model, {})
        if version not in versions:
            raise ServerError(f"Model version {version} does not exist")
        if versions[version].is_default and len(versions) > 1:
            raise ServerError("Cannot remove default version")
        file_name = versions[version].file_name
        if versions.pop(version).is_downloaded:
            (self.store / file_name).unlink(missing_ok=True)
        if not versions:
            del self.all[model]

    def probe(self, model: str, version: str) -> dict[str, Any]:
        assert self.has_secret
        self.calls.append(("probe", version))
        if self.probe_error is not None:
            raise ServerError(self.probe_error)
        contents = read_archive(self.store / self.all[model][version].file_name)
        return {"backbone": contents.description.sha256, "plan": contents.plan and contents.plan.digest()}

    def predict(self, model: str, version: str, request: SampleRequest, *, to_the_end: bool = False) -> Prediction:
        assert self.has_secret or not to_the_end
        self.calls.append(("predict", version, "to the end" if to_the_end else ""))
        return self.answer
