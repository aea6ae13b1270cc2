"""The configuration of TorchServe: a user's config.properties, except for the settings that `ee-serve` decides."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import javaproperties

from early_exit.handler.errors import ConfigError

CONFIG_VARIABLE = "TS_CONFIG_FILE"
"""The `config.properties` that `ee-serve` uses without `--config`, as TorchServe itself does."""
METRICS_FILE = "metrics_config"
PLUGINS = "plugins_path"
VM_ARGUMENTS = "vmargs"
_PATHS = (METRICS_FILE, PLUGINS, "keystore", "private_key_file", "certificate_file", "workflow_store", "cpp_log_config")
"""Settings with paths, which TorchServe takes relative to the folder it is started in, not to that of `ee-serve`."""
_GRPC = "grpc_"
"""The beginning of the settings with TorchServe's gRPC addresses, which `ee-serve` prints."""
_VARIABLES = "enable_envvars_config"
"""The setting with which TorchServe's environment variables override its configuration."""
_NAMED_OTHERWISE = {"TS_TOKEN_EXPIRATION_TIME_MIN": "token_expiration_min",
                    "TS_OPEN_INFERENCE_PROTOCOL": "ts_open_inference_protocol"}
"""The settings of the variables whose names, without TS_, are not the names of their settings."""
_VARIABLE = re.compile(r"\$\$([^$]+)\$\$")
"""The form of an environment variable in a value."""
_SHOWN = 100
"""The number of characters of a value that a message shows."""


@dataclass(frozen=True)
class Decided:
    """A setting that the user's configuration does not decide."""

    value: str | None
    """The value of the setting; None leaves the setting out."""
    because_of: str
    """The reason for the value, in words."""


def read_config(path: Path | None) -> dict[str, str]:
    """Return the settings of a config.properties as TorchServe reads them: with absolute paths and, if the file asks
    for it, with those of TorchServe's environment variables.

    Args:
        path: the file; without one, there are no settings.

    Raises:
        ConfigError: the file cannot be read, or a path in it holds a variable that is not set.
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
    """Return the user's settings, with the decided settings in place of the user's own.

    Args:
        settings: the user's settings.
        decided: the settings that the user cannot decide.
        source: the user's file.
        log: receives a line for each setting of the user that is ignored.
    """
    for name, decision in decided.items():
        if name in settings and settings[name] != decision.value:
            instead = "" if decision.value is None else f": it is {decision.value}"
            log(f"{source}: {name}={settings[name]:.{_SHOWN}} is ignored, because of {decision.because_of}{instead}")
    kept = {name: value for name, value in settings.items() if name not in decided}
    return kept | {name: decision.value for name, decision in decided.items() if decision.value is not None}


def vm_arguments(settings: Mapping[str, str], ours: Mapping[str, str], source: Path | None,
                 log: Callable[[str], None]) -> list[str]:
    """Return Java's arguments: the user's, and our own system properties.

    Args:
        settings: the user's settings.
        ours: our own system properties, by name.
        source: the user's file.
        log: receives a line for each argument of the user that is ignored.
    """
    arguments = []
    for argument in settings.get(VM_ARGUMENTS, "").split():
        name = argument.removeprefix("-D").partition("=")[0]
        if argument.startswith("-D") and name in ours:
            log(f"{source}: {argument:.{_SHOWN}} of {VM_ARGUMENTS} is ignored, because of ee-serve: it is "
                f"{ours[name]}")
        else:
            arguments.append(argument)
    return [*arguments, *(f"-D{name}={value}" for name, value in ours.items())]


def class_path(settings: Mapping[str, str], own: str) -> str:
    """Return Java's class path: TorchServe's own and, if there are any, the user's plugins."""
    plugins = settings.get(PLUGINS)
    return own if plugins is None else f"{own}:{plugins if '*' in plugins else plugins + '/*'}"


def as_properties(settings: Mapping[str, str]) -> str:
    """Return settings as the text of a config.properties."""
    return javaproperties.dumps(settings, timestamp=None)


def _expanded(value: str, source: Path) -> str:
    """Return a value with its variables replaced by their values."""
    try:
        return _VARIABLE.sub(lambda match: os.environ[match[1]], value)
    except KeyError as error:
        raise ConfigError(f"{source}: the variable {error.args[0]} of {value!r} is not set: set it where ee-serve is "
                          "started") from error
