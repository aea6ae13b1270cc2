"""The operator's switch: one small file for each model, which its workers read before each batch.

It knows of no version, plan, certificate or record, so nothing that replaces one of these turns it. No file is on; a
file that cannot be read, or says something else, is off: whoever wrote it wanted something else than before.
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
"""Name of that folder where `ee-serve` makes it, beside the tokens."""
SWITCH_FILE = "switch"
_LEVEL = re.compile(r"level ([0-9]{1,3})")
_LONGEST = 64
"""No position takes more bytes."""


@dataclass(frozen=True)
class Position:
    """What a switch is set to; its text is what the file holds."""

    least_level: int | None
    """The fallback level that answers, unless the monitor has stepped further back: 0 is the plan as deployed. None is
    the last level of every plan, which has no exits."""

    @classmethod
    def parse(cls, text: str) -> Position:
        """Read a position.

        Raises:
            ValueError: it is none.

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
        """Return the fallback level that is asked for of a version that has so many beyond its first.

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
            folder: of the switches of all models; without one the switch is always on.
            model: its name.

        Raises:
            ArchiveError: the name of the model leads out of the folder.
        """
        self.path = None if folder is None else folder / bare_name(model, "the name of a model") / SWITCH_FILE
        """The file that holds the position. Workers make its folder, which so tells that they read the switch."""
        self.position = ON
        """What was read last."""
        self.trouble: str | None = None
        """Why the position could not be read the last time, in which case it is off."""

    @classmethod
    def of_environment(cls, model: str) -> ExitSwitch:
        """Return the switch of a model in the folder that the process was started with, made ready for workers.

        Raises:
            ConfigError: the environment names a folder relative to the worker's own, which goes when the worker goes.
        """
        named = os.environ.get(SWITCHES_VARIABLE, "").strip()
        if named and not Path(named).is_absolute():
            raise ConfigError(f"{SWITCHES_VARIABLE}: expected an absolute path, found {named!r}")
        switch = cls(Path(named) if named else None, model)
        if switch.path is not None:
            try:
                private_folder(switch.path.parent)
            except OSError as error:  # reading it fails, too, and that is off
                logger.error("cannot make the folder of the exits' switch: %s", error)
        return switch

    def read(self) -> Position:
        """Return what the switch is set to now."""
        if self.path is not None:
            try:
                self.position, self.trouble = _read(self.path), None
            except (OSError, ValueError) as error:
                self.position, self.trouble = OFF, str(error)
        return self.position

    def set(self, position: Position) -> None:
        """Set the switch; it counts for every batch that a worker begins after this.

        Raises:
            OSError: it cannot be written, or its folder belongs to somebody else.
        """
        with replacing(self._there()) as scratch:
            try:
                scratch.write_text(f"{position}\n")
            except OSError:
                if position != OFF:
                    raise
                # The disk may be full, which may be the incident: a file without content is off, too.

    def keep(self) -> None:
        """Have what was set survive that the machine fails; on a busy disk that takes a while.

        Raises:
            OSError: the disk does not take it.
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
    # The content, not the time of its change: two changes may have the same time.
    try:
        content = read_start(path, _LONGEST)
    except FileNotFoundError:
        path.parent.stat()  # where that is gone too, nobody knows what the switch was set to
        return ON
    return Position.parse(content.decode("ascii").strip())
