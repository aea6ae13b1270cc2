"""The interface of a model server that rollout and watch need, independent of the kind of server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from early_exit.handler.sample_request import SampleRequest


@dataclass(frozen=True)
class RunSettings:
    """The settings that a version runs with. They come from the configuration of its archive, or else from the roll or
    user that registers it. None stands for a setting that is not given."""

    batch_size: int | None = None
    """The largest number of requests that a worker takes at once."""
    max_batch_delay_ms: int | None = None
    """How long a request may wait for others that are put into the same batch."""
    response_timeout_s: int | None = None
    """How long a worker may take for a batch."""
    workers: tuple[int, int] | None = None
    """The smallest and the largest number of workers."""


@dataclass(frozen=True, order=True)
class Claim:
    """The mark that a roll leaves on the version that it registers, to distinguish it from the versions of rivals."""

    ticket: int
    """One above every ticket that the roll saw when it began."""
    nonce: str
    """A random text of letters and digits."""


@dataclass(frozen=True)
class VersionStatus:
    """The status of one model version, as its server reports it."""

    version: str
    is_default: bool
    """Whether requests that name no version go to this one."""
    n_workers: int
    """How many workers the version is meant to have."""
    n_ready: int
    """How many workers can take requests now."""
    pending_requests: int
    """Requests in the version's queue; those that a worker has taken are not counted."""
    settings: RunSettings
    """The settings that the version runs with; none of them is missing."""
    file_name: str
    """The name of the version's archive in the server's model store."""
    is_downloaded: bool = False
    """Whether the server fetched the archive into its store by a URL; TorchServe deletes it there with the version."""
    claim: Claim | None = None
    """The claim of the roll that registered the version; None if no roll did, or the server was restarted since."""


def default_of(versions: Sequence[VersionStatus]) -> VersionStatus | None:
    """Return the version to which requests go that name none, or None if there is none."""
    return next((status for status in versions if status.is_default), None)


@dataclass(frozen=True)
class Prediction:
    """A server's answer to a prediction request, whatever its status."""

    status: int
    headers: Mapping[str, str]
    """The response headers, by their names in lower case."""
    body: bytes
    error: str | None
    """Why there is no answer, in the server's words; None if the status is that of a success."""


class ModelServer(Protocol):
    """A model server with its model store; `str()` returns its name for messages.

    Each method raises a ServerError if the server does not answer or refuses.
    """

    @property
    def has_secret(self) -> bool:
        """Whether the secret of the server's workers is known, which they require for probes and for requests that run
        to the end."""

    def models(self) -> list[str]:
        """Return the names of the models that are registered."""

    def versions(self, model: str) -> list[VersionStatus]:
        """Return the registered versions of a model; none if the model is not registered.

        The default version is read first: a version that becomes the default in the meantime may be returned as one
        that is not.
        """

    def named_requests(self, model: str, version: str) -> float | None:
        """Return how many requests have named a version since the server was started; None if the server does not say.

        Requests that name no version are not counted.
        """

    def register(self, file_name: str, settings: RunSettings, *, model: str | None = None,
                 claim: Claim | None = None) -> None:
        """Load an archive of the model store as a new version; its workers start in the background.

        Args:
            file_name: the file name of the archive.
            settings: the settings to give the server; the others follow from the configurations of archive and server.
            model: the name to serve it under; by default the name in the archive.
            claim: the mark by which the version can be recognised from then on.
        """

    def scale(self, model: str, version: str, workers: tuple[int, int]) -> None:
        """Set the smallest and the largest number of workers of a version; they start in the background."""

    def set_default(self, model: str, version: str, *, limit_s: float) -> None:
        """Send the requests that name no version to this one from now on.

        Args:
            model: the name of a served model.
            version: a registered version of the model.
            limit_s: how long the server may take. After that, a ServerError says that there was no answer, and it is
                not known whether the version is the default.
        """

    def unregister(self, model: str, version: str) -> None:
        """Remove a version at once, with the requests that it has not answered."""

    def probe(self, model: str, version: str) -> dict[str, Any]:
        """Let a version check itself; return the result of its probe: 'backbone' (sha256) and 'plan' (digest or None).

        This requires the secret.
        """

    def predict(self, model: str, version: str, request: SampleRequest, *, to_the_end: bool = False) -> Prediction:
        """Return a version's answer to a request; one that is refused raises a ServerError.

        Args:
            model: the name of a served model.
            version: a registered version of the model.
            request: the request to send.
            to_the_end: whether the request runs through the whole backbone, whatever the exits decide; this requires
                the secret.
        """
