"""How the new version is to be run: as the old one is, unless its own configuration says otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from early_exit.archiver.control import RunSettings
from early_exit.archiver.packaging.registered import RegisteredArchive
from early_exit.handler.errors import ServerError

_WORDS = {"batch_size": ("batch size", "{}"), "max_batch_delay_ms": ("batch delay", "{} ms"),
          "response_timeout_s": ("response timeout", "{} s"), "workers": ("workers", "{0[0]} to {0[1]}")}
"""What each is called, and how it is written."""


@dataclass(frozen=True)
class SettingsPlan:
    """What becomes of the old version's settings."""

    to_register: RunSettings
    """What the server is told when the new version is registered; the rest is its configuration's."""
    workers: tuple[int, int] | None
    """What the new version is to be scaled to once it is registered; none where it starts as it is to be."""
    kept: RunSettings
    """What stays as it was."""
    changed: RunSettings
    """What the new version's configuration says otherwise."""


def plan_settings(was: RunSettings | None, before: RunSettings | None, new: RegisteredArchive) -> SettingsPlan:
    """Decide how a new version is run.

    What its configuration leaves open is as it was. What its configuration says holds, but for workers: a version that
    was given others while it served keeps them where the new configuration says the same as the old one's.

    Args:
        was: how the old version is run; None where there is none.
        before: what the old version's configuration says; None where that is not known.
        new: the archive of the new version.
    """
    if was is None:
        return SettingsPlan(RunSettings(workers=None if new.configured.workers else (1, 1)), None, RunSettings(),
                            RunSettings())
    least, most = was.workers or (1, 1)
    least = max(1, least)  # a version that was given none gets one: it could not be tried out
    has, says = {**_values(was), "workers": (least, max(least, most))}, _values(new.configured)
    may_scale = new.may_have_more_workers and before is not None and before.workers == says["workers"]
    kept = {name: value for name, value in has.items()
            if says[name] in (None, value) or (name == "workers" and may_scale)}
    changed = {name: value for name, value in says.items() if value is not None and name not in kept}
    told = {name: value for name, value in kept.items() if says[name] is None}
    needs_scaling = "workers" in kept and kept["workers"] != (says["workers"] or (least, least))
    return SettingsPlan(RunSettings(**told), kept["workers"] if needs_scaling else None, RunSettings(**kept),
                        RunSettings(**changed))


def require_kept(plan: SettingsPlan, has: RunSettings, new: str, old: str) -> None:
    """Check that a server runs a new version as it was told.

    TorchServe 0.12 gives a version whose model-config.yaml names no response timeout one of 120 s, whatever it is
    registered with; only without that file it takes the one of the registration.

    Raises:
        ServerError: it does not.
    """
    given = _values(has)
    lost = [_instead(name, given[name], value) for name, value in _values(plan.kept).items()
            if value not in (None, given[name])]
    if lost:
        raise ServerError(f"the server gives {new} {' and '.join(lost)} as {old} has it: say in the new archive's "
                          "model-config.yaml what it shall be (ee-archive --config FILE)")


def in_words(plan: SettingsPlan, was: RunSettings, old: str) -> Iterator[str]:
    """Tell what is kept of an old version's settings, and what is not."""
    kept = [" ".join(_WORDS[name]).format(value) for name, value in _values(plan.kept).items() if value is not None]
    if kept:
        yield f"as {old} has it: {', '.join(kept)}"
    had = _values(was)
    changed = [_instead(name, value, had[name]) for name, value in _values(plan.changed).items() if value is not None]
    if changed:
        yield f"as its own model-config.yaml says: {', '.join(changed)}"


def _instead(name: str, value: Any, other: Any) -> str:
    what, written = _WORDS[name]
    return f"{what} {written.format(value)} instead of {written.format(other)}"


def _values(settings: RunSettings) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in fields(settings)}
