"""The trial of a new version: when it is over, why a version fails it, and which versions cannot be tried at all."""

from __future__ import annotations

from early_exit.archiver.watch.status import ModelStatus
from early_exit.handler.config import ServingConfig
from early_exit.handler.errors import ConfigError
from early_exit.handler.monitor.shared_state import MONITOR_FILES


def has_passed(status: ModelStatus, trial_samples: int) -> bool:
    """Tell whether the trial of a version that has raised no alarm is over: enough samples have spoken for it."""
    return status.n_on_trial >= trial_samples


def failure(status: ModelStatus) -> str | None:
    """Return why a version on trial must be taken back; None if nothing speaks against it yet."""
    if status.first_alarm is not None:
        return "a worker could not read the monitor's state" if status.is_state_lost else "the monitor raised an alarm"
    if status.monitors:
        return None
    if (why := why_unwatched(status.config)) is None and not (
            status.plan is not None and status.plan.is_certified_for(status.traffic)):
        why = "its plan is certified for other traffic than it gets"
    return None if why is None else f"no monitor watches it, so its trial would never end: {why}"


def require_watched(status: ModelStatus) -> None:
    """Check that a monitor would watch a version with a new plan, which has the configuration of the served one.

    Raises:
        ConfigError: none would, so the trial of the version would never end.
    """
    if (why := why_unwatched(status.config)) is not None:
        raise ConfigError(f"the plan of {status.model} {status.version} is not renewed, because no monitor would watch "
                          f"the new one, and its trial would never end: {why}. Set another value, with ee-archive "
                          "--config FILE, and roll that version in, or end ee-watch")


def why_unwatched(config: ServingConfig) -> str | None:
    """Return the setting with which no monitor watches a version, whatever its plan; None if there is none."""
    if not config.exits:
        return "early_exit.exits is false in its model-config.yaml, so no request leaves early"
    if not config.sampling(has_exits=True):
        return ("early_exit.sampling_rate is 0 in its model-config.yaml, so no request is compared with the whole "
                "model")
    return None


def why_unseen(status: ModelStatus) -> str | None:
    """Return why an alarm of the served version would not be seen; None if it would be, or if there can be none yet.

    A worker writes the state of its monitor before the first shard.
    """
    plan = status.plan
    if (status.monitors or not status.is_recorded or plan is None or not plan.exits
            or not plan.is_certified_for(status.traffic) or why_unwatched(status.config) is not None):
        return None
    return (f"there are records of {status.model} {status.version}, but the state of its monitor, a file "
            f"{MONITOR_FILES} beside them, is not there, so an alarm would not be seen: pass the records folders that "
            "the workers write to, with all their files")
