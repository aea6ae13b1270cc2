"""Reads text and YAML files of users as UTF-8. Errors name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from early_exit.handler.errors import ConfigError


def read_text(path: Path, what: str) -> str:
    """Return the text of a UTF-8 file, without the byte order mark that some editors write.

    Args:
        path: the file.
        what: the kind of file, for messages, such as "the configuration".

    Raises:
        ConfigError: the file cannot be read, or has another encoding.
    """
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {what} {path}: expected UTF-8, found the byte {error.object[error.start]:#04x} "
                          f"at {error.start}: save it as UTF-8, which TorchServe expects too") from error


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: the YAML.
        source: the name of the text in messages.

    Raises:
        ConfigError: the text is not YAML.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a ValueError
        raise ConfigError(f"cannot read {source}: {error}") from error


def read_yaml(path: Path, what: str) -> Any:
    """Return the value of a YAML file; for arguments and errors see `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path, what), f"{what} {path}")
