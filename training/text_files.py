"""Text and YAML that users give: read in one encoding, and refused with the file's name where that is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from early_exit.handler.errors import ConfigError


def read_text(path: Path, what: str) -> str:
    """Return the text of a UTF-8 file, without the mark with which some editors begin one.

    Args:
        path: the file.
        what: names its kind in messages, such as "the configuration".

    Raises:
        ConfigError: it cannot be read, or is in another encoding.
    """
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {what} {path}: expected UTF-8, found the byte {error.object[error.start]:#04x} "
                          f"at {error.start}: save it as UTF-8, which TorchServe expects too") from error


def parse_yaml(text: str, source: str) -> Any:
    """Return what YAML says.

    Args:
        text: is parsed.
        source: names it in messages.

    Raises:
        ConfigError: it is no YAML.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise ConfigError(f"cannot read {source}: {error}") from error


def read_yaml(path: Path, what: str) -> Any:
    """Return what a YAML file says; for arguments and errors see `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path, what), f"{what} {path}")
