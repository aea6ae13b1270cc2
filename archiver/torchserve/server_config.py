"""The configuration of a TorchServe of ours: a user's config.properties, but for what `ee-serve` decides itself."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import javaproperties

from early_exit.handler.errors import ConfigError

CONFIG_VARIABLE = "TS_CONFIG_FILE"
"""The `config.properties` that `ee-serve` uses where `--config` is not given, as TorchServe itself does."""
METRICS_FILE = "metrics_config"
PLUGINS = "plugins_path"
VM_ARGUMENTS = "vmargs"
_PATHS = (METRICS_FILE, PLUGINS, "keystore", "private_key_file", "certificate_file", "workflow_store", "cpp_log_config")
"""Settings that TorchServe takes as paths in the folder in which it is started, which is not that of `ee-serve`."""
_GRPC = "grpc_"
"""How settings begin that tell where TorchServe listens for gRPC, which `ee-serve` prints."""
_VARIABLES = "enable_envvars_config"
"""Setting with which TorchServe's environment variables count before its configuration."""
_NAMED_OTHERWISE = {"TS_TOKEN_EXPIRATION_TIME_MIN": "token_expiration_min",
                    "TS_OPEN_INFERENCE_PROTOCOL": "ts_open_inference_protocol"}
"""By variable: its setting, where that is not what comes after TS_."""
_VARIABLE = re.compile(r"\$\$([^$]+)\$\$")
"""How an environment variable stands in a value."""
_SHOWN = 100
"""Characters of a value that is told."""


@dataclass(frozen=True)
class Decided:
    """A setting that is not the user's."""

    value: str | None
    """What it is; None leaves it out."""
    because_of: str
    """What decides it, in words."""


def read_config(path: Path | None) -> dict[str, str]:
    """Return the settings of a config.properties as TorchServe reads them: with what its environment variables say,
    where it asks for that, and with absolute paths.

    Args:
        path: the file; without one there are no settings.

    Raises:
        ConfigError: it cannot be read, or a path in it holds a variable that is not set.
    """
    if path is None:
        return {}
    try:
        with path.open("rb") as file:
            settings: dict[str, str] = javaproperties.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read TorchServe's configuration {path}: {error}") from error
    if settings.pop(_VARIABLES, "").lower() == "true":
        settings |= {_NAMED_OTHERWISE.get(name, name.removeprefix("TS_").lower()): value
                     for name, value in os.environ.items() if name.startswith("TS_") and name != CONFIG_VARIABLE}
    needed = {name: _expanded(value, path) for name, value in settings.items()
              if name in _PATHS or name.startswith(_GRPC)}
    return settings | {name: str(Path(value).absolute()) if name in _PATHS else value
                       for name, value in needed.items()}


def merged(settings: Mapping[str, str], decided: Mapping[str, Decided], source: Path | None,
           log: Callable[[str], None]) -> dict[str, str]:
    """Return a user's settings with those that are decided in the place of the user's own.

    Args:
        settings: the user's.
        decided: what is not the user's to set.
        source: the user's file.
        log: called with a line about each setting of the user's that does not count.
    """
    for name, decision in decided.items():
        if name in settings and settings[name] != decision.value:
            instead = "" if decision.value is None else f"; it is {decision.value}"
            log(f"{source}: {name}={settings[name]:.{_SHOWN}} does not count, because of {decision.because_of}"
                f"{instead}")
    kept = {name: value for name, value in settings.items() if name not in decided}
    return kept | {name: decision.value for name, decision in decided.items() if decision.value is not None}


def vm_arguments(settings: Mapping[str, str], ours: Mapping[str, str], source: Path | None,
                 log: Callable[[str], None]) -> list[str]:
    """Return Java's arguments: the user's, and the system properties that are ours.

    Args:
        settings: the user's.
        ours: system properties by name.
        source: the user's file.
        log: called with a line about each argument of the user's that does not count.
    """
    arguments = []
    for argument in settings.get(VM_ARGUMENTS, "").split():
        name = argument.removeprefix("-D").partition("=")[0]
        if argument.startswith("-D") and name in ours:
            log(f"{source}: {argument:.{_SHOWN}} of {VM_ARGUMENTS} does not count, because of ee-serve; it is "
                f"{ours[name]}")
        else:
            arguments.append(argument)
    return [*arguments, *(f"-D{name}={value}" for name, value in ours.items())]


def class_path(settings: Mapping[str, str], own: str) -> str:
    """Return Java's class path, given that of TorchServe: with the user's plugins, where there are some."""
    plugins = settings.get(PLUGINS)
    return own if plugins is None else f"{own}:{plugins if '*' in plugins else plugins + '/*'}"


def as_properties(settings: Mapping[str, str]) -> str:
    """Return settings as the text of a config.properties."""
    return javaproperties.dumps(settings, timestamp=None)


def _expanded(value: str, source: Path) -> str:
    """Return a value with what its variables hold."""
    try:
        return _VARIABLE.sub(lambda match: os.environ[match[1]], value)
    except KeyError as error:
        raise ConfigError(f"{source}: the variable {error.args[0]} of {value!r} is not set: set it where ee-serve is "
                          "started") from error
