"""The model-config.yaml of an archive: the user's, with what the engine and the answers need."""

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
    """Content of the file; none where the archive needs no file."""
    engine: str
    """Name of the engine that the archive is executed by."""


def serving_config(text: str) -> ServingConfig:
    """Return how an archive serves by the text of its model-config.yaml, which may be empty.

    Raises:
        ConfigError: it is not YAML, or holds a wrong setting.
    """
    return ServingConfig.from_model_config(parse_yaml(text, f"the archive's {CONFIG_FILE}"))


def read_configuration(file: Path | None, engine: str | None, log: Callable[[str], None]) -> Configuration:
    """Return the configuration of an archive.

    Args:
        file: the user's model-config.yaml, if there is one.
        engine: name of the engine that is to replace the user's.
        log: called with a line about what was changed for TorchServe's sake.

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
        log("early answers need TorchServe's continuous batching with one worker: the archive's model-config.yaml says "
            + ", ".join(f"{name}: {str(value).lower()}" for name, value in needed.items()))
    if changed != (content or {}):
        text = yaml.safe_dump(changed, sort_keys=False)
    return Configuration(None if file is None and engine is None else text, serving.engine)
