"""The model-config.yaml of an archive: the user's file, with the settings that the engine and early answers need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from early_exit.handler.config import EARLY, ServingConfig
from early_exit.handler.torchserve.continuous_batching import SERVER_SETTINGS
from early_exit.training.text_files import parse_yaml, read_text

CONFIG_FILE = "model-config.yaml"


@dataclass(frozen=True)
class Configuration:
    """A model-config.yaml that has been checked."""

    text: str | None
    """The content of the file; None if the archive needs no file."""
    serving: ServingConfig
    """How the archive serves and records."""


def serving_config(text: str) -> ServingConfig:
    """Return the serving configuration in the text of an archive's model-config.yaml, which may be empty.

    Raises:
        ConfigError: the text is not YAML, or holds a wrong setting.
    """
    return ServingConfig.from_model_config(parse_yaml(text, f"the archive's {CONFIG_FILE}"))


def read_configuration(file: Path | None, engine: str | None, log: Callable[[str], None]) -> Configuration:
    """Return the configuration of an archive.

    Args:
        file: the user's model-config.yaml, if there is one.
        engine: the name of the engine that replaces the user's; None keeps it.
        log: receives a line about the settings that were changed for TorchServe.

    Raises:
        ConfigError: the file cannot be read, or holds a wrong setting.
    """
    text = read_text(file, "the configuration") if file else ""
    content = parse_yaml(text, f"the configuration {file}")
    serving = ServingConfig.from_model_config(content)
    changed = dict(content or {})
    if engine is not None:
        changed["early_exit"] = {**(changed.get("early_exit") or {}), "engine": engine}
        serving = ServingConfig.from_model_config(changed)
    needed = {name: value for name, value in SERVER_SETTINGS.items() if changed.get(name) != value}
    if serving.answers == EARLY and needed:
        changed |= needed
        log("early answers need TorchServe's continuous batching with one worker, so the archive's model-config.yaml "
            "sets " + ", ".join(f"{name}: {str(value).lower()}" for name, value in needed.items()))
    if changed != (content or {}):
        text = yaml.safe_dump(changed, sort_keys=False)
    return Configuration(None if file is None and engine is None else text, serving)
