"""The settings of the new version: those of the old one, unless its own configuration differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from early_exit.archiver.control import RunSettings
from early_exit.archiver.packaging.registered import RegisteredArchive
from early_exit.handler.errors import ServerError

_WORDS = {"batch_size": ("batch size", "{}"), "max_batch_delay_ms": ("batch delay", "{} ms"),
          "response_timeout_s": ("response timeout", "{} s"), "workers": ("workers", "{0[0]} to {0[1]}")}
"""The name of each setting in words, and the format of its value."""


@dataclass(frozen=True)
class SettingsPlan:
    """The settings of a new version, and how they differ from the old version's."""

    to_register: RunSettings
    """The settings to give the server when the new version is registered; the others are in its configuration."""
    workers: tuple[int, int] | None
    """The numbers of workers to which the new version is scaled after registration; None if it needs no scaling."""
    kept: RunSettings
    """The settings that stay as they were."""
    changed: RunSettings
    """The settings that the new version's configuration changes."""


def plan_settings(was: RunSettings | None, before: RunSettings | None, new: RegisteredArchive) -> SettingsPlan:
    """Decide the settings of a new version.

    Settings that its configuration leaves open stay as they were. The settings in its configuration hold, except for
    workers: if the old version was scaled while it served, the new one keeps that number, provided that both
    configurations name the same workers.

    Args:
        was: the settings of the old version; None if there is no old version.
        before: the settings in the old version's configuration; None if it is not known.
        new: the archive of the new version.
    """
    if was is None:
        return SettingsPlan(RunSettings(workers=None if new.configured.workers else (1, 1)), None, RunSettings(),
                            RunSettings())
    least, most = was.workers or (1, 1)
    least = max(1, least)  # a version without workers gets one, to be tried out
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
    """Check that a server runs a new version with the settings that it was given.

    If a version's model-config.yaml names no response timeout, TorchServe 0.12 uses 120 s, whatever the registration
    says; only without that file, it uses the timeout of the registration.

    Raises:
        ServerError: the server runs the version with other settings.
    """
    given = _values(has)
    lost = [_instead(name, given[name], value) for name, value in _values(plan.kept).items()
            if value not in (None, given[name])]
    if lost:
        raise ServerError(f"the server gives {new} {' and '.join(lost)}, which {old} has: set it in the new archive's "
                          "model-config.yaml (ee-archive --config FILE)")


def in_words(plan: SettingsPlan, was: RunSettings, old: str) -> Iterator[str]:
    """Yield lines about the settings that are kept from the old version, and about those that are not."""
    kept = [" ".join(_WORDS[name]).format(value) for name, value in _values(plan.kept).items() if value is not None]
    if kept:
        yield f"kept from {old}: {', '.join(kept)}"
    had = _values(was)
    changed = [_instead(name, value, had[name]) for name, value in _values(plan.changed).items() if value is not None]
    if changed:
        yield f"set by its own model-config.yaml: {', '.join(changed)}"


def _instead(name: str, value: Any, other: Any) -> str:
    what, written = _WORDS[name]
    return f"{what} {written.format(value)} instead of {written.format(other)}"


def _values(settings: RunSettings) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in fields(settings)}
