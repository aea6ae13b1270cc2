"""Lets a version answer before it gets any traffic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from early_exit.archiver.control import ModelServer
from early_exit.archiver.packaging.configuration import serving_config
from early_exit.archiver.packaging.describe import describe
from early_exit.archiver.packaging.registered import RegisteredArchive
from early_exit.archiver.rollout.clock import Clock
from early_exit.archiver.rollout.sample_answer import require_same_answer
from early_exit.handler.archive_contents import ArchiveContents
from early_exit.handler.errors import ServerError
from early_exit.handler.sample_request import SampleRequest


@dataclass(frozen=True)
class TryOut:
    """A version that will be tried out."""

    mar: Path
    archive: RegisteredArchive
    """The content of the archive."""
    old: RegisteredArchive | None
    """The archive of the version that serves; None if there is no such version, or its archive is not here."""
    request: SampleRequest | None
    """The request that the version must answer; by default a sample of its own, or of the old version."""

    def require_request(self) -> None:
        """Check that there is a request to try the backbone out with, or that the same backbone serves already.

        Raises:
            ServerError: no request is known.
        """
        backbone = _backbone(self.archive)
        serves_already = backbone is not None and self.old is not None and _backbone(self.old) == backbone
        if self._sample is not None or serves_already:
            return
        raise ServerError(f"{self.mar.name} has no sample request, so its backbone has never answered a real one: pass "
                          "--request FILE, here or to ee-archive, or --untried to let it serve without a trial")

    def run(self, server: ModelServer, model: str, clock: Clock, log: Callable[[str], None]) -> float:
        """Check that the version computes the same as its archive, and that it answers.

        Args:
            server: the server that has the version.
            model: the name under which the version is registered.
            clock: the clock of the roll.
            log: receives a line for each check that is not possible.

        Returns:
            The seconds of a request that ran to the end; 0 if no request did.

        Raises:
            ServerError: a check failed.
        """
        if self.archive.ours is None:
            return self._answer_to_the_end(server, model, clock, log)
        contents = self.archive.ours
        if server.has_secret:
            _require_same(contents, server.probe(model, self.archive.version))
            return self._answer_to_the_end(server, model, clock, log)
        samples = [sample for sample in (self.request, *contents.samples[:1]) if sample is not None]
        predictions = [server.predict(model, self.archive.version, sample) for sample in samples]
        if contents.sample_answers:
            require_same_answer(contents, describe(self.mar)["engine"], predictions[-1])
            log("not probed, because the server's secret is not known; its sample request is answered as it was where "
                "the archive was made")
        else:
            log("not probed, because the server's secret is not known, and the archive has no stored answer to compare "
                "with: the server may have loaded another archive of that name")
        return 0.0

    @property
    def _sample(self) -> SampleRequest | None:
        """The request to try the version out with; for an original, a sample of the archive that `ee-archive` made."""
        known: tuple[ArchiveContents | None, ...] = (self.archive.ours,)
        if self.archive.ours is None and self.old is not None:
            known = (self.old.ours,)
        return self.request or next((sample for ours in known if ours is not None for sample in ours.samples), None)

    def _answer_to_the_end(self, server: ModelServer, model: str, clock: Clock, log: Callable[[str], None]) -> float:
        """Let the version answer a request, and then once more to the end; return the seconds of the second answer.

        An archive that is not ours has no exits, so every request runs to the end.
        """
        sample, version = self._sample, self.archive.version
        if sample is None:
            if self.archive.ours is None:
                log(f"{version} was not tried out: no request for it is known")
            return 0.0
        server.predict(model, version, sample)
        sent = clock.now()
        server.predict(model, version, sample, to_the_end=self.archive.ours is not None)
        return clock.now() - sent


def _backbone(archive: RegisteredArchive) -> str | None:
    return None if archive.ours is None else archive.ours.description.sha256


def _require_same(contents: ArchiveContents, probe: dict[str, Any]) -> None:
    """Check that the server loaded this archive, not another file of that name in its model store."""
    # With "exits: false" the worker does not even load the plan.
    plan = contents.plan if serving_config(contents.configuration).exits else None
    expected = {"backbone": contents.description.sha256, "plan": plan and plan.digest()}
    found = {name: probe.get(name) for name in expected}
    if found != expected:
        raise ServerError(f"the server loaded another archive of that name: expected {expected}, found {found}. Is "
                          "this one in its model store?")
