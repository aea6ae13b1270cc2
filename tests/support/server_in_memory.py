"""A server of models that is no process."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from early_exit.archiver.control import Prediction, VersionStatus
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.errors import ServerError
from early_exit.handler.sample_request import SampleRequest


@dataclass
class ServerInMemory:
    """Serves nothing, but knows which versions it would serve, and remembers what it was asked to do."""

    name: str
    store: Path
    probe_error: str | None = None
    """What every probe fails with."""
    has_secret: bool = True
    answer: Prediction = field(default_factory=lambda: Prediction(200, {}, b"{}", None))
    """What every request is answered with."""
    registered: dict[str, VersionStatus] = field(default_factory=dict)
    calls: list[tuple[str, ...]] = field(default_factory=list)

    def __str__(self) -> str:
        return self.name

    @property
    def default(self) -> str | None:
        return next((version for version, status in self.registered.items() if status.is_default), None)

    def versions(self, model: str) -> list[VersionStatus]:
        return list(self.registered.values()) if model == "digits" else []

    def register(self, file_name: str, workers: int) -> None:
        version = read_archive(self.store / file_name).version
        self.calls.append(("register", version))
        self.registered[version] = VersionStatus(version, not self.registered, workers, workers, 0, 0.0, 1, file_name)

    def scale(self, model: str, version: str, workers: int) -> None:
        self.calls.append(("scale", version, str(workers)))
        self.registered[version] = replace(self.registered[version], n_workers=workers, n_ready=workers)

    def set_default(self, model: str, version: str) -> None:
        self.calls.append(("set_default", version))
        self.registered = {name: replace(status, is_default=name == version)
                           for name, status in self.registered.items()}

    def unregister(self, model: str, version: str) -> None:
        self.calls.append(("unregister", version))
        assert not self.registered.pop(version).is_default, "it still got requests"

    def probe(self, model: str, version: str) -> dict[str, Any]:
        assert self.has_secret
        self.calls.append(("probe", version))
        if self.probe_error is not None:
            raise ServerError(self.probe_error)
        contents = read_archive(self.store / self.registered[version].file_name)
        return {"backbone": contents.description.sha256, "plan": contents.plan and contents.plan.digest()}

    def predict(self, model: str, version: str, request: SampleRequest, *, to_the_end: bool = False) -> Prediction:
        assert self.has_secret or not to_the_end
        self.calls.append(("predict", version, "to the end" if to_the_end else ""))
        return self.answer
