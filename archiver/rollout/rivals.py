"""Two rolls of one model at once, from any hosts: exactly one brings its version in, and only that one says so.

The management API has no lock and no test-and-set. This is what TorchServe 0.12 does (measured):

- A version number is held by one registration at a time. The description of a version repeats the URL that it was
  registered with, and of that URL only the last part is looked for in the model store. So each roll registers under a
  URL with a claim of its own (`Claim`), and a description tells whose registration it is.
- The first version of a model is the default as soon as it is registered. Where two first registrations race, both
  may be answered with success, and only one of them is kept, also where both have the same number.
- A default cannot be removed while other versions are there. A version that is not there cannot become the default.

**What a roll does.** It looks (1) and remembers which registration is the default; its ticket is one above all
tickets that it sees. It registers (2) and tries its version out. At least `SETTLE_S` after its registration was
answered it looks again (3), and goes on if

- its own registration is still there,
- the default is the one of look 1, or its own, and
- of the other rolls' versions that are registered beside the default, none has a higher ticket than its own, or the
  same ticket and a higher nonce.

Then it makes its version the default (4), within `SWITCH_S` of the beginning of look 3; where not enough of that time
is left it looks again instead. A roll that may not go on takes its version back. A first version, which is the
default and cannot be taken back while others are there, waits until the rival before it has become the default or is
gone. Once the old version is removed the roll looks a last time, and reports success only if the default is its own
registration.

**What is assumed.** Clocks need not agree, and none goes faster than another by more than `SETTLE_S` / `SWITCH_S`. A
switch takes effect before it is answered, and within `SWITCH_S` of the beginning of the look before it: the call is
cut off then, and where its answer is lost the version is removed unless it is the default, so that a late call finds
no version. A look asks for the default first and then for the versions. Nobody else makes a version the default; if
somebody does, the last look tells.

**At most one goes on.** Let A and B be rolls of which neither found the other's version as the default in look 1 (one
that did begins after the other's switch, and replaces its version). Suppose that both go on. Say that A's look 3
reads the versions before B is registered. Then A's switch takes effect at most `SWITCH_S` after B's registration. B's
look 3 begins `SETTLE_S` after that registration or later, so it finds a default that is neither its own nor that of
its look 1: B does not go on. The same holds with A and B exchanged. So each is registered when the other's look 3
reads the versions. Tickets and nonces are the same for both, and put one before the other: the other does not go on,
a contradiction. Of two first versions only one is the default, and the other finds a default that was not there in
its look 1, and goes.

**At least one goes on,** if both versions pass their trials and no call is cut off. Of two that see each other the
first goes on unless the default has changed, which takes a switch of the other. One that sees no rival goes on. A
first version waits for its rival's end: one that found no default in its look 1 goes, and one that found this version
there has a higher ticket, so that it goes on.

**A success is one:** the last look finds the roll's own registration at the default. A roll that began after this
one's switch may replace the version later, as it may at any time.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from early_exit.archiver.control import Claim, ModelServer, RunSettings, VersionStatus
from early_exit.archiver.rollout.clock import Clock
from early_exit.handler.errors import ServerError

SWITCH_S = 4.0
"""How long a roll may take from the beginning of its last look until its version is the default."""
SETTLE_S = 5.0
"""How long after its registration a roll looks whether it has rivals; longer than any of them may take to switch."""
_LEAST_TO_SWITCH_S = 1.0
"""With less time than this left a roll looks again rather than switches."""
_TAKE_BACK_S = 30.0
"""How long a version that cannot be removed yet is tried to be."""
_POLL_S = 0.2


class Candidate:
    """A version that a roll brings in, from before its registration until it is the default or is taken back."""

    def __init__(self, server: ModelServer, model: str, version: str, found: Sequence[VersionStatus],
                 clock: Clock) -> None:
        """Remember what was there at the beginning.

        Args:
            server: the server.
            model: name that the version is served under.
            version: its number.
            found: the versions that were registered when the roll began.
            clock: of the roll.
        """
        self._server, self._model, self._version, self._clock = server, model, version, clock
        self._replaces = default_of(found)
        tickets = [status.claim.ticket for status in found if status.claim is not None]
        self._claim = Claim(max(tickets, default=0) + 1, secrets.token_hex(8))
        self._registered = clock.now()
        self._has_been_default = False

    def register(self, file_name: str, settings: RunSettings) -> None:
        """Register the version from an archive of the model store.

        Raises:
            ServerError: the server refuses; the version may be registered all the same.
        """
        self._server.register(file_name, settings, model=self._model, claim=self._claim)
        self._registered = self._clock.now()

    def status(self) -> VersionStatus:
        """Return what the server tells of the version.

        Raises:
            ServerError: it is not registered, or by somebody else.
        """
        return self._own(self._server.versions(self._model))

    def become_default(self, limit_s: float) -> None:
        """Make the version the default, if no rival comes before it.

        Args:
            limit_s: how long rivals that must be waited for may take.

        Raises:
            ServerError: a rival comes before it, or the server does not answer; the version is not the default, or a
                first one that has to be taken back.
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
                    f"the server takes longer than {SWITCH_S:.0f} s to tell its versions and switch" if rival is None
                    else f"{rival.version} was registered beside it and is neither the default nor taken back: was its "
                         f"roll cut short? Remove it and roll {self._version} in again")
            self._clock.sleep(_POLL_S)

    def require_default(self) -> None:
        """Check that the version is the default still.

        Raises:
            ServerError: another one is.
        """
        versions = self._server.versions(self._model)
        if not self._own(versions).is_default:
            raise ServerError(f"{self._model} {self._version} was the default, and {_name_of_default(versions)} has "
                              "taken its place meanwhile: did someone else roll?")

    def take_back(self, log: Callable[[str], None]) -> None:
        """Remove the version, unless it is not this roll's or serves; errors are only logged."""
        deadline = self._clock.now() + _TAKE_BACK_S
        try:
            while (own := self._find(versions := self._server.versions(self._model))) is not None:
                if not own.is_default and self._has_been_default:
                    log(f"{self._version} is left to {_name_of_default(versions)}, which has taken its place")
                    return
                is_removable = not own.is_default or len(versions) == 1
                if is_removable and self._is_removed(own):
                    log(f"{self._version} is removed again")
                    return
                if self._replaces is not None or self._clock.now() >= deadline:
                    log(f"{self._version} has become the default all the same and is left to serve")
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
        if not own.is_default and default_of(versions) != self._replaces:
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
            if not self.status().is_default:  # else only the answer was lost
                raise

    def _own(self, versions: Sequence[VersionStatus]) -> VersionStatus:
        own = self._find(versions)
        if own is None:
            raise ServerError(f"{self._model} {self._version} is not registered by this roll (any more): did someone "
                              "else roll, or was the server restarted?")
        self._has_been_default |= own.is_default
        return own

    def _find(self, versions: Sequence[VersionStatus]) -> VersionStatus | None:
        return next((status for status in versions if status.claim == self._claim), None)


def default_of(versions: Sequence[VersionStatus]) -> tuple[str, Claim | None] | None:
    """Return what tells the registration of the default from any other, of the same number too; None without one."""
    return next(((status.version, status.claim) for status in versions if status.is_default), None)


def _name_of_default(versions: Sequence[VersionStatus]) -> str:
    return next((status.version for status in versions if status.is_default), "no version")
