"""Two rolls of one model at once, from any hosts: exactly one brings its version in, and only that one reports success.

The management API has no lock and no test-and-set. TorchServe 0.12 behaves as follows (measured):

- A version number is held by one registration at a time. The description of a version repeats the URL with which it was
  registered, and only the last part of that URL is looked for in the model store. So each roll registers under a URL
  with a claim of its own (`Claim`), and a description shows whose registration it is.
- The first version of a model is the default as soon as it is registered. If two first registrations race, both may be
  answered with success, but only one of them is kept, even if both have the same number.
- A default cannot be removed while other versions exist. A version that does not exist cannot become the default.

**What a roll does.** The roll looks (1) and remembers which registration is the default; its ticket is one above all
tickets that it sees. It registers its version (2) and tries the version out. At least `SETTLE_S` after its registration
was answered, it looks again (3), and continues if

- its own registration still exists,
- the default is the one of look 1, or its own, and
- no other roll whose version is registered beside the default comes before it: none has a higher ticket, or the same
  ticket and a higher nonce.

Then it makes its version the default (4), within `SWITCH_S` of the beginning of look 3; if too little of that time is
left, it looks again instead. A roll that may not continue takes its version back. A roll whose version is the model's
first cannot take it back while other versions exist, because it is the default. It waits until the rival that comes
before it has become the default or is gone. Once the old version is removed, the roll looks a last time, and reports
success only if the default is its own registration.

**Assumptions.** Clocks need not agree, but no clock runs faster than another by more than the factor `SETTLE_S` /
`SWITCH_S`. A switch takes effect before it is answered, and within `SWITCH_S` of the beginning of the look before it.
The call is cut off after that time. If its answer is lost, the version is removed unless it is the default, so that a
late call finds no version. A look reads the default first and then the versions. Nobody else makes a version the
default; if somebody does, the last look shows it. A failed roll that makes its old version the default again is such a
somebody.

**At most one continues.** Let A and B be two rolls, neither of which found the other's version as the default in its
look 1. (A roll that found it began after the other's switch, and replaces the other's version.) Suppose that both
continue, and that A's look 3 reads the versions before B is registered. Then A's switch takes effect at most `SWITCH_S`
after B's registration. B's look 3 begins `SETTLE_S` or more after that registration, so it finds a default that is
neither its own nor that of its look 1: B does not continue. The same holds with A and B exchanged. So each is
registered when the other's look 3 reads the versions. Both see the same tickets and nonces, which put one roll before
the other, so the other does not continue: a contradiction. Of two first versions, only one is the default. The other
finds a default that did not exist in its look 1, and gives up.

**At least one continues,** if both versions pass their trials and no call is cut off. Of two rolls that see each other,
the first continues unless the default has changed, and only a switch by the other changes the default. A roll that sees
no rival continues. A first version waits for the end of its rival: a rival that found no default in its look 1 gives
up, and a rival that found this version there has a higher ticket, so it continues.

**A reported success is true:** the last look finds the roll's own registration as the default. A roll that began after
this one's switch may replace the version later, as it may at any time.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from early_exit.archiver.control import Claim, ModelServer, RunSettings, VersionStatus, default_of
from early_exit.archiver.rollout.clock import Clock
from early_exit.handler.errors import ServerError

SWITCH_S = 4.0
"""How long a roll may take from the beginning of its last look until its version is the default."""
SETTLE_S = 5.0
"""How long a roll waits after its registration before it looks for rivals; longer than a rival may take to switch."""
_LEAST_TO_SWITCH_S = 1.0
"""If less time than this is left, a roll looks again instead of switching."""
_TAKE_BACK_S = 30.0
"""How long a roll tries to remove a version that cannot be removed yet."""
_POLL_S = 0.2


class Candidate:
    """A version that a roll brings in, from before its registration until it is the default or is taken back."""

    def __init__(self, server: ModelServer, model: str, version: str, found: Sequence[VersionStatus],
                 clock: Clock) -> None:
        """Remember the state of the server when the roll began.

        Args:
            server: the server.
            model: the name under which the version is served.
            version: the number of the version.
            found: the versions that were registered when the roll began.
            clock: the clock of the roll.
        """
        self._server, self._model, self._version, self._clock = server, model, version, clock
        self._replaces = identity_of_default(found)
        tickets = [status.claim.ticket for status in found if status.claim is not None]
        self._claim = Claim(max(tickets, default=0) + 1, secrets.token_hex(8))
        self._registered = clock.now()
        self._has_been_default = False

    def register(self, file_name: str, settings: RunSettings) -> None:
        """Register the version from an archive of the model store.

        Raises:
            ServerError: the server refuses or does not answer; the version may be registered nevertheless.
        """
        self._server.register(file_name, settings, model=self._model, claim=self._claim)
        self._registered = self._clock.now()

    def status(self) -> VersionStatus:
        """Return the status of the version.

        Raises:
            ServerError: the version is not registered, or somebody else registered it.
        """
        return self._own(self._server.versions(self._model))

    def serves(self) -> bool | None:
        """Tell whether the version is the default; None if the server does not answer."""
        try:
            own = self._find(self._server.versions(self._model))
        except ServerError:
            return None
        return own is not None and own.is_default

    def become_default(self, limit_s: float) -> None:
        """Make the version the default, if no rival comes before it.

        Args:
            limit_s: how long to wait for rivals that come first.

        Raises:
            ServerError: a rival comes before it, or the server does not answer. The version is not the default, or it
                is a first version that must be taken back.
        """
        self._clock.sleep(max(0.0, self._registered + SETTLE_S - self._clock.now()))
        deadline = self._clock.now() + limit_s
        while True:
            began = self._clock.now()
            own, rival = self._look()
            if rival is None and own.is_default:
                return
            left_s = began + SWITCH_S - self._clock.now()
            if rival is None and left_s >= _LEAST_TO_SWITCH_S:
                self._switch(left_s)
                return
            if self._clock.now() >= deadline:
                raise ServerError(
                    f"the server takes longer than {SWITCH_S:.0f} s to report its versions and switch" if rival is None
                    else f"{rival.version} was registered at the same time and is neither the default nor taken back: "
                         f"was its roll interrupted? Remove it, and roll {self._version} in again")
            self._clock.sleep(_POLL_S)

    def require_default(self) -> None:
        """Check that the version is still the default.

        Raises:
            ServerError: another version is the default.
        """
        versions = self._server.versions(self._model)
        if not self._own(versions).is_default:
            raise ServerError(f"{self._model} {self._version} was the default, and {_name_of_default(versions)} has "
                              "taken its place meanwhile: did someone else roll?")

    def take_back(self, log: Callable[[str], None]) -> None:
        """Remove the version, unless it serves or is not this roll's; errors are only logged."""
        deadline = self._clock.now() + _TAKE_BACK_S
        try:
            while (own := self._find(versions := self._server.versions(self._model))) is not None:
                if not own.is_default and self._has_been_default:
                    log(f"{self._version} is left to the roll of {_name_of_default(versions)}, which has replaced it")
                    return
                is_removable = not own.is_default or len(versions) == 1
                if is_removable and self._is_removed(own):
                    log(f"{self._version} is removed again")
                    return
                if self._replaces is not None or self._clock.now() >= deadline:
                    log(f"{self._version} could not be taken back: it is the default and keeps serving")
                    return
                self._clock.sleep(_POLL_S)
        except ServerError as error:  # the failure that led here is the one to report
            log(f"{self._version} could not be removed: {error}")

    def _is_removed(self, own: VersionStatus) -> bool:
        """Remove the version; tell whether that was possible."""
        try:
            self._server.unregister(self._model, self._version)
        except ServerError:
            if not own.is_default:
                raise
            return False  # a rival has been registered beside the default since the look
        return True

    def _look(self) -> tuple[VersionStatus, VersionStatus | None]:
        """Return the version and the rival that it must wait for, if there is one.

        Raises:
            ServerError: the version must not become the default.
        """
        versions = self._server.versions(self._model)
        own = self._own(versions)
        if not own.is_default and identity_of_default(versions) != self._replaces:
            raise ServerError(f"{_name_of_default(versions)} has become the default of {self._model} meanwhile: did "
                              "someone else roll?")
        rivals = [status for status in versions if status.claim is not None and not status.is_default
                  and status.claim > self._claim]
        if rivals and not own.is_default:
            raise ServerError(f"{self._model} {rivals[0].version} is being rolled in at the same time and comes first: "
                              f"roll {self._version} in again when that is done")
        return own, rivals[0] if rivals else None

    def _switch(self, limit_s: float) -> None:
        try:
            self._server.set_default(self._model, self._version, limit_s=limit_s)
        except ServerError:
            if not self.status().is_default:  # otherwise, only the answer was lost
                raise

    def _own(self, versions: Sequence[VersionStatus]) -> VersionStatus:
        own = self._find(versions)
        if own is None:
            raise ServerError(f"{self._model} {self._version} is no longer registered by this roll: did someone else "
                              "roll, or was the server restarted?")
        self._has_been_default |= own.is_default
        return own

    def _find(self, versions: Sequence[VersionStatus]) -> VersionStatus | None:
        return next((status for status in versions if status.claim == self._claim), None)


def identity_of_default(versions: Sequence[VersionStatus]) -> tuple[str, Claim | None] | None:
    """Return the version and claim of the default, which identify its registration; None if there is no default."""
    default = default_of(versions)
    return (default.version, default.claim) if default else None


def _name_of_default(versions: Sequence[VersionStatus]) -> str:
    default = default_of(versions)
    return default.version if default else "no version"
