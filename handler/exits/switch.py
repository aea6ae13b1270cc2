"""The operator's switch: one small file for each model, which its workers read before each batch.

The switch does not depend on versions, plans, certificates or records, so replacing one of these does not change it.
Without a file, the switch is on. If the file cannot be read, or does not hold a position, the switch is off, because
the operator who wrote the file wanted a change.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from early_exit.handler.errors import ConfigError
from early_exit.handler.files.names import bare_name
from early_exit.handler.files.private import private_folder, read_start, replacing

logger = logging.getLogger(__name__)

SWITCHES_VARIABLE = "EARLY_EXIT_SWITCHES"
"""The folder of the operator's switches, an absolute path. `ee-serve` sets this variable. Without it there is no
switch."""
SWITCHES_FOLDER = "exits"
"""Name of the folder that `ee-serve` creates for the switches, beside the tokens."""
SWITCH_FILE = "switch"
_LEVEL = re.compile(r"level ([0-9]{1,3})")
_LONGEST = 64
"""Positions are shorter than this, in bytes."""


@dataclass(frozen=True)
class Position:
    """A position of the switch; its text is the content of the file."""

    least_level: int | None
    """The lowest fallback level that may answer; the monitor may have gone to a higher level. Level 0 is the plan as
    deployed. None stands for the last level of any plan, which has no exits."""

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read a position.

        Raises:
            ValueError: the text is not a position.

        >>> Position.parse("level 2"), Position.parse("on") == Position.parse("level 0")
        (Position(least_level=2), True)
        """
        if text in ("on", "off"):
            return ON if text == "on" else OFF
        if level := _LEVEL.fullmatch(text):
            return cls(int(level[1]))
        raise ValueError(f"expected 'on', 'off' or 'level N', found {text!r}")

    def __str__(self) -> str:
        if self.least_level is None:
            return "off"
        return f"level {self.least_level}" if self.least_level else "on"

    def level(self, last_level: int) -> int:
        """Return the fallback level that this position means for a version with this last level.

        >>> [Position.parse(text).level(3) for text in ("on", "level 2", "level 9", "off")]
        [0, 2, 3, 3]
        """
        return last_level if self.least_level is None else min(self.least_level, last_level)


ON, OFF = Position(0), Position(None)


class ExitSwitch:
    """The switch of one model."""

    def __init__(self, folder: Path | None, model: str) -> None:
        """Find the switch.

        Args:
            folder: the folder of the switches of all models, or None for a switch that is always on.
            model: name of the model.

        Raises:
            ArchiveError: the name of the model leads out of the folder.
        """
        self.path = None if folder is None else folder / bare_name(model, "the name of a model") / SWITCH_FILE
        """The file that holds the position. Workers create its folder, which shows that they read the switch."""
        self.position = ON
        """The position that was read last."""
        self.trouble: str | None = None
        """The reason why the last reading of the position failed; the position is then off. None if it succeeded."""

    @classmethod
    def of_environment(cls, model: str) -> ExitSwitch:
        """Return the switch of a model in the folder that the environment names, and create the model's folder in it.

        Raises:
            ConfigError: the environment variable holds a relative path. Such a path would lie in the worker's own
                folder, which is deleted with the worker.
        """
        named = os.environ.get(SWITCHES_VARIABLE, "").strip()
        if named and not Path(named).is_absolute():
            raise ConfigError(f"{SWITCHES_VARIABLE}: expected an absolute path, found {named!r}")
        switch = cls(Path(named) if named else None, model)
        if switch.path is not None:
            try:
                private_folder(switch.path.parent)
            except OSError as error:  # reading the switch will fail too, and then it is off
                logger.error("cannot create the folder of the exits' switch: %s", error)
        return switch

    def read(self) -> Position:
        """Read the current position of the switch."""
        if self.path is not None:
            try:
                self.position, self.trouble = _read(self.path), None
            except (OSError, ValueError) as error:
                self.position, self.trouble = OFF, str(error)
        return self.position

    def set(self, position: Position) -> None:
        """Set the switch; the position applies to every batch that a worker begins after this.

        Raises:
            OSError: the file cannot be written, or its folder belongs to somebody else.
        """
        with replacing(self._there()) as scratch:
            try:
                scratch.write_text(f"{position}\n")
            except OSError:
                if position != OFF:
                    raise
                # A full disk may be the reason for switching off. An empty file means off, too.

    def keep(self) -> None:
        """Sync the position to the disk, so that it survives a crash of the machine; on a busy disk this takes a while.

        Raises:
            OSError: the disk cannot store the position.
        """
        for place in (self._there(), self._there().parent):
            descriptor = os.open(place, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _there(self) -> Path:
        assert self.path is not None, "there is no folder of switches"
        return self.path


def _read(path: Path) -> Position:
    # The content is read each time. The time of the last change is not enough: two changes may have equal times.
    try:
        content = read_start(path, _LONGEST)
    except FileNotFoundError:
        path.parent.stat()  # raises if the folder is gone too: then the position is unknown
        return ON
    return Position.parse(content.decode("ascii").strip())
