"""`ee-watch`: watches the exits of a served model, renews them when there is reason to, and takes bad ones back."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from early_exit.archiver.rollout.cli import add_longest_batch
from early_exit.archiver.torchserve.server_options import add_server_options, servers_of
from early_exit.archiver.watch.lock import only_watcher
from early_exit.archiver.watch.status import ModelStatus
from early_exit.archiver.watch.trial import why_unseen
from early_exit.archiver.watch.triggers import Terms, fresh_after, wanted_records
from early_exit.archiver.watch.watched import Watched
from early_exit.archiver.watch.watcher import ROLL_FAILED, TROUBLE, Watcher
from early_exit.handler.errors import ConfigError
from early_exit.handler.files.names import bare_name
from early_exit.training.cli import add_options, options_of
from early_exit.training.command import command_parser, log_to_stderr, raise_on_terminate, run_command
from early_exit.training.data.traffic import OTHER_TRAFFIC

_DAY_S = 24 * 3600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ee-watch`; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_status = arguments[:1] == ["status"]
    options = parser().parse_args(arguments[1:] if is_status else arguments)
    if is_status or options.dry_run:
        return run_command("ee-watch", lambda: _show(options))
    raise_on_terminate()
    return run_command("ee-watch", lambda: _watch(options))


def _show(options: argparse.Namespace) -> int:
    print(_status(_watched(options), as_json=options.json))
    return 0


def _watch(options: argparse.Namespace) -> int:
    watched = _watched(options)
    try:
        with only_watcher(options.model_store / f".ee-watch-{options.model}.lock"):
            return _keep_looking(watched, options)
    except KeyboardInterrupt:  # the usual way to end it
        return 0


def _keep_looking(watched: Watched, options: argparse.Namespace) -> int:
    """Look again and again; with --once, look once and return the exit status."""
    watcher = Watcher(watched, log_to_stderr)
    n_known = len(watched.audit.read())
    while True:
        watcher.tick()
        events = watched.audit.read()
        decisions, n_known = events[n_known:], len(events)
        if options.json:
            print(*map(json.dumps, decisions), sep="\n", end="\n" if decisions else "", flush=True)
        if options.once:
            if not decisions:
                log_to_stderr(f"nothing to do; 'ee-watch status {options.model}' shows the state of the model")
            return int(any(decision["event"] in (TROUBLE, ROLL_FAILED) for decision in decisions))
        time.sleep(options.every_s)


def parser() -> argparse.ArgumentParser:
    """Return the parser of `ee-watch`'s command line, `ee-watch status` included."""
    parser = command_parser(
        "ee-watch", "Watch a served model. ee-watch trains a new plan and rolls it in when a fifth of the records are "
        "new, the backbone or the traffic has changed, the monitor has raised an alarm, or the certificate is too old. "
        "It rolls back a version that raises an alarm on trial. 'ee-watch status ...' shows the state of a model.", """
        ee-watch cifar --records records --tolerance 0.02
        show what it would do now, and the state of the model:
          ee-watch cifar --dry-run
          ee-watch status cifar --json""")
    parser.add_argument("model", help="the name of the served model")
    parser.add_argument("--records", nargs="+", default=["records"], metavar="RECORDS",
                        help="records folders and URLs, one or more for each host (records)")
    parser.add_argument("--model-store", type=Path, default=Path("model-store"), metavar="FOLDER",
                        help="the servers' model store (%(default)s)")
    parser.add_argument("--state", type=Path, metavar="FOLDER",
                        help="the folder for the audit and the runs (.ee-watch/MODEL)")
    parser.add_argument("--every-s", type=float, default=60.0, metavar="S",
                        help="the time between two checks, in seconds (%(default)s)")
    parser.add_argument("--max-age-days", type=float, default=30.0, metavar="D",
                        help="the age in days at which a certificate is renewed (%(default)s)")
    parser.add_argument("--trial-samples", type=int, default=300, metavar="N",
                        help="the number of shadow samples after which a new version is accepted (%(default)s)")
    add_longest_batch(parser)
    parser.add_argument("--once", action="store_true",
                        help="check once, act, and exit, with status 1 if the check or a roll fails")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    parser.add_argument("--json", action="store_true", help="print the status, or each decision as one line, as JSON")
    add_server_options(parser)
    add_options(parser)
    return parser


def _watched(options: argparse.Namespace) -> Watched:
    bare_name(options.model, "MODEL", ConfigError)  # it becomes the name of folders and of the lock
    return Watched(
        model=options.model, servers=servers_of(options), store=options.model_store, sources=options.records,
        state=options.state or Path(".ee-watch") / options.model, options=lambda archive: options_of(options, archive),
        labels=options.labels, terms=Terms(options.tolerance, 1 - options.confidence, options.max_age_days * _DAY_S),
        trial_samples=options.trial_samples, longest_batch_s=options.longest_batch_s)


def _status(watched: Watched, *, as_json: bool) -> str:
    watcher = Watcher(watched)
    status = watcher.look()
    trigger, trial = watcher.trigger(status), watcher.on_trial(status)
    now = time.time()
    n_fresh = status.n_newer(fresh_after(status, watched.audit, now))
    wanted = wanted_records(status, watched.audit, watched.terms, now)
    events = watched.audit.read()
    facts = {
        "model": status.model, "version": status.version, "backbone": status.backbone.sha256[:12],
        "plan": status.plan.digest() if status.plan else "none",
        "certificate": _certificate(status), "step": max((state.step for state in status.monitors), default=0),
        "records": len(status.times), "fresh records": n_fresh,
        "needed": n_fresh - status.n_newer(wanted.newer_than) + wanted.n,
        "shadow samples watched": status.n_watched,
        "on trial": trial is not None,
        "next": "a verdict on the trial" if trial else f"renew ({trigger.reason})" if trigger else "wait",
        **({"obstacle": obstacle} if (obstacle := watcher.obstacle(status)) else {}),
        "last decision": events[-1] if events else None,
    }
    if as_json:
        return json.dumps(facts, indent=1)
    if events:
        facts["last decision"] = f"{time.strftime('%F %T', time.gmtime(events[-1]['time']))} {events[-1]['event']}"
    return "\n".join(f"{name:22}  {value}" for name, value in facts.items())


def _certificate(status: ModelStatus) -> str:
    if status.plan is None or status.plan.certificate is None:
        return "none"
    if not status.plan.is_certified_for(status.traffic):
        return f"none for this traffic: {OTHER_TRAFFIC}"
    if status.first_alarm is not None:
        since = f"{time.strftime('%F %T', time.gmtime(status.first_alarm))} UTC"
        return (f"not known since {since}: a worker could not read the monitor's state, which may have held an alarm. "
                "The version answers without exits until the plan is renewed, or until you have stopped its workers, "
                "deleted the file that their log names, and started them again"
                if status.is_state_lost else f"void since {since}")
    if (why := why_unseen(status)) is not None:
        return f"not known: {why}"
    return status.plan.certificate.in_words()

