"""`ee-exits`: switch the exits of a model off and on, at once and without asking the server."""

from __future__ import annotations

import argparse
import json
import os
import pwd
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from early_exit.archiver.audit import Audit, audit_of
from early_exit.handler.errors import ServerError
from early_exit.handler.exits.switch import SWITCHES_FOLDER, SWITCHES_VARIABLE, ExitSwitch, Position
from early_exit.handler.files.names import bare_name
from early_exit.training.command import command_parser, run_command

STATUS, LEVEL = "status", "level"
DEFAULT_FOLDER = Path(".ee-serve") / SWITCHES_FOLDER


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ee-exits`; return its exit status."""
    command = parser()
    options = command.parse_args(argv)
    if (options.action == LEVEL) != (options.level is not None):
        command.error("'level' needs a number, as in 'level 1', and no other action takes one")
    return run_command("ee-exits", lambda: _exits(options))


def _exits(options: argparse.Namespace) -> int:
    model = bare_name(options.model, "the name of a model", ServerError)
    switch, audit = ExitSwitch(options.switches, model), audit_of(options.switches, model)
    _require_workers(options.switches, model)
    if options.action == STATUS:
        print(_status(model, switch, audit, as_json=options.json))
        return 0
    position = Position.parse(options.action if options.level is None else f"{LEVEL} {options.level}")
    switch.set(position)
    try:  # after the switch, which a slow disk or a damaged audit must not delay
        switch.keep()
        event = audit.append(f"exits {position}", command="ee-exits", by=_user())
    except OSError as error:
        raise ServerError(f"the exits of {model} are {position} from the next batch on, but this setting could not be "
                          f"saved, or not noted in {audit.path}: {error}") from error
    print(json.dumps(event) if options.json else f"{model}  exits {position}, from the next batch on")
    return 0


def _require_workers(folder: Path, model: str) -> None:
    """Check that a worker of the model has looked for its switch in this folder.

    Raises:
        ServerError: no worker has, so no worker would notice the switch.
    """
    if (folder / model).is_dir():
        return
    known = sorted(place.name for place in folder.iterdir() if place.is_dir()) if folder.is_dir() else []
    raise ServerError(
        f"no worker of {model} has looked for a switch in {folder.resolve()}, so no worker would see it. Found "
        f"{', '.join(known) or 'no models'} there. Expected the folder that ee-serve prints as 'switches', or the one "
        f"in the server's variable {SWITCHES_VARIABLE}: pass it with --switches. Archives made by versions without "
        "ee-exits do not look for a switch: repackage them")


def _status(model: str, switch: ExitSwitch, audit: Audit, *, as_json: bool) -> str:
    position, latest = switch.read(), next(iter(reversed(audit.read())), None)
    set_ = latest if latest and latest["event"] == f"exits {position}" and not switch.trouble else {}
    told: dict[str, Any] = {"model": model, "exits": str(position), "unreadable": switch.trouble,
                            "file": str(switch.path), "time": set_.get("time"), "by": set_.get("by")}
    if as_json:
        return json.dumps(told)
    line = f"{model}  exits {position}"
    if switch.trouble:
        return f"{line}, as the switch cannot be read: {switch.trouble}"
    if set_:
        return f"{line}, set at {datetime.fromtimestamp(set_['time']):%Y-%m-%d %H:%M:%S} by {set_['by']}"
    return line if latest is None else f"{line}, set by other means than ee-exits"


def _user() -> str:
    """Return the name of the current user, or the number of a user without a name, as in containers."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def parser() -> argparse.ArgumentParser:
    """Return the parser of `ee-exits`'s command line."""
    parser = command_parser(
        "ee-exits", "Switch the exits of a model off, and on again. The setting takes effect at the next batch of "
        "every worker on this host. It holds for all versions until it is changed: rolls, renewals and restarts keep "
        "it.", """
        answer every request in full, now:
          ee-exits cifar off
        let exits answer again:
          ee-exits cifar on
        let exits answer at fallback level 1 of the plan, or at a higher one that the monitor has chosen:
          ee-exits cifar level 1""")
    parser.add_argument("model", metavar="NAME", help="the name under which the model is served")
    parser.add_argument("action", choices=["off", "on", LEVEL, STATUS],
                        help="what to do: status shows the current setting")
    parser.add_argument("level", nargs="?", type=_level, metavar="N",
                        help="the fallback level, with 'level': 0 is the plan as deployed, and beyond the last "
                             "fallback level the exits are off")
    named = os.environ.get(SWITCHES_VARIABLE)
    parser.add_argument("--switches", type=Path, metavar="FOLDER", default=Path(named) if named else DEFAULT_FOLDER,
                        help=f"the folder of the server's switches; by default the folder in {SWITCHES_VARIABLE}, "
                             f"else {DEFAULT_FOLDER}")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _level(text: str) -> int:
    level = int(text)
    if not 0 <= level <= 999:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 999, found {text}")
    return level
