"""`ee-train`: build exits from recorded traffic."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from early_exit.handler.archive_contents import read_archive
from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.config import ServingConfig
from early_exit.handler.engines.registry import ENGINES
from early_exit.handler.errors import ConfigError
from early_exit.handler.exits.risk import Risk
from early_exit.handler.files.private import replacing
from early_exit.training.command import command_parser, log_to_stderr, print_next, run_command
from early_exit.training.data.preprocessing import archived_config
from early_exit.training.data.replay import AUGMENTATIONS, Replay
from early_exit.training.data.shards import find_shards, readable_shards
from early_exit.training.data.sources import local_folders
from early_exit.training.data.split import SplitRule
from early_exit.training.heads.distill import Distillation
from early_exit.training.heads.nni_service import Service
from early_exit.training.heads.search import Search
from early_exit.training.heads.space import SearchSpace
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from early_exit.training.report.evaluate import evaluate
from early_exit.training.report.html import html_page


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ee-train`; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    work, options = (_report, report_parser().parse_args(arguments[1:])) if arguments[:1] == ["report"] else (
        _train, parser().parse_args(arguments))
    return run_command("ee-train", lambda: work(options),
                       when_interrupted="interrupted; the same command continues where this one stopped")


def _train(options: argparse.Namespace) -> int:
    contents = read_archive(options.archive)
    with tempfile.TemporaryDirectory() as scratch:
        archive = ArchiveLayout(Path(scratch))
        extract(options.archive, archive.root)
        run = RunPaths(options.to)
        found = find_shards(local_folders(options.records, run.remote), contents.model, contents.description, _log,
                            may_be_renamed=True)
        shards = readable_shards(found, _log)
        report = train(contents.model, archive, shards, options_of(options, archive), run, mar=options.archive,
                       labels=options.labels, log=_log)
    print(json.dumps(report.to_json(), indent=1) if options.json else report.to_text().rstrip())
    print_next(f"ee-train report {options.to} for a page about this run, "
               f"ee-archive {options.archive} --plan {run.plan} to serve the plan")
    return 0


def _report(options: argparse.Namespace) -> int:
    run = RunPaths(options.run)
    evaluation = evaluate(run, options.archive, log=_log)
    as_json = json.dumps(evaluation.to_json(), indent=1)
    for path, text in ((run.evaluation, as_json), (run.report_html, html_page(evaluation))):
        with replacing(path) as scratch:
            scratch.write_text(text)
    print(as_json if options.json else f"{run.report_html}\n{run.evaluation}")
    return 0


def _log(line: str) -> None:
    log_to_stderr(f"ee-train: {line}")


def report_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line of `ee-train report`."""
    parser = command_parser(
        "ee-train report", "Evaluate a finished run. ee-train writes a page about it, report.html, and the same "
        "figures as JSON, evaluation.json, into the folder of the run. Nothing is trained.", """
        ee-train report runs/first""")
    parser.add_argument("run", type=Path, metavar="runs/NAME", help="the folder of the run")
    parser.add_argument("--archive", type=Path, metavar="X.mar",
                        help="the archive that was recorded, if it has moved since")
    parser.add_argument("--json", action="store_true", help="print evaluation.json")
    return parser


def parser() -> argparse.ArgumentParser:
    """Return the parser of `ee-train`'s command line."""
    parser = command_parser(
        "ee-train", "Build early exits from recorded traffic: exit heads, temperatures, confidence thresholds, the "
        "subset of exits to use, and a certificate. The same command continues a run that was stopped. 'ee-train "
        "report runs/NAME' evaluates a finished run.", """
        ee-train records --archive model-store/cifar-2.0.mar --to runs/first
        stricter, and with more confidence:
          ee-train records --archive model-store/cifar-2.0.mar --to runs/strict --tolerance 0.01 --confidence 0.99
        more training data from the same records, if requests were kept:
          ee-train records --archive model-store/cifar-2.0.mar --to runs/replayed --replay
        by the paper's rules, without a guarantee:
          ee-train records --archive model-store/cifar-2.0.mar --to runs/paper --thresholds paper --cost flops""")
    parser.add_argument("records", nargs="+", metavar="RECORDS",
                        help="records folders, as ee-serve prints them, or URLs such as s3://bucket/records")
    parser.add_argument("--archive", type=Path, required=True, metavar="X.mar", help="the archive that was recorded")
    parser.add_argument("--to", type=Path, required=True, metavar="runs/NAME", help="the folder of this run")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run; `options_of` reads them."""
    defaults = TrainingOptions()
    promise = parser.add_argument_group("guarantee")
    promise.add_argument("--tolerance", type=_fraction, metavar="T", default=defaults.tolerance,
                         help="the largest expected loss of an answer (%(default)s)")
    promise.add_argument("--confidence", type=_fraction, metavar="P", default=defaults.confidence,
                         help="the confidence of the certificate (%(default)s)")
    promise.add_argument("--risk", type=Risk, choices=list(Risk), default=defaults.risk, metavar="RISK",
                         help="what counts as a loss: disagreement, confidence-gap or accuracy (disagreement)")
    promise.add_argument("--labels", type=Path, metavar="FILE.csv",
                         help="a file of request ids and true classes, for --risk accuracy and for the report; where "
                              "requests have several instances, each line is: request id, instance (from 0), class")
    promise.add_argument("--thresholds", choices=("certified", "paper", "equal"), default=defaults.thresholds,
                         help="how confidence thresholds are set: certified, or without a guarantee by the paper's "
                              "budgets T/2^n (paper) or by T/exits (equal) (%(default)s)")
    promise.add_argument("--split", type=SplitRule, choices=list(SplitRule), default=defaults.split, metavar="RULE",
                         help="time trains on the oldest records and certifies on the newest; random splits as the "
                              "paper does, which assumes that no request is like another one (time)")
    cost = parser.add_argument_group("cost")
    cost.add_argument("--cost", choices=("seconds", "flops"), default=defaults.measure,
                      help="what is minimised: seconds measured on this machine, or FLOPs as in the paper "
                           "(%(default)s)")
    cost.add_argument("--batch-size", type=_count, metavar="N",
                      help="the batch size for which time is measured (the archive's batchSize)")
    cost.add_argument("--measure-device", metavar="DEVICE", default=defaults.measure_device,
                      help="the device on which time is measured, the one that will serve (%(default)s)")
    heads = parser.add_argument_group("heads")
    heads.add_argument("--search", default="nni", metavar="SEARCH",
                       help="how heads are chosen: nni searches in this process, nni-service searches in NNI's "
                            "service, none takes the default head, and FILE.yaml takes the heads in that file (nni)")
    heads.add_argument("--service", type=Path, metavar="FILE.yaml",
                       help="for nni-service: a file with trialConcurrency and trainingService as in NNI (one trial "
                            "at a time on this machine)")
    heads.add_argument("--expose-nni", action="store_true",
                       help="let NNI's service listen on all interfaces, which trials on other machines need; anyone "
                            "who reaches its port then runs code as you")
    heads.add_argument("--space", type=Path, metavar="FILE.yaml",
                       help="a search space to use instead of the default one")
    heads.add_argument("--trials", type=_count, metavar="N", default=Search().trials,
                       help="the number of heads to try for each layer (%(default)s)")
    heads.add_argument("--layers", type=_count, metavar="N", default=defaults.layers,
                       help="the largest number of candidate layers that get an exit head (%(default)s)")
    heads.add_argument("--replay", type=_count_or_none, nargs="?", const=Replay().rounds, metavar="ROUNDS",
                       help="run the recorded requests again, this many times with augmentations (%(const)s); needs "
                            "keep_requests while recording")
    heads.add_argument("--augment", nargs="*", choices=AUGMENTATIONS, default=list(AUGMENTATIONS),
                       help="the augmentations for --replay (all of %(choices)s)")
    heads.add_argument("--train-device", metavar="DEVICE", default=Distillation().device,
                       help="the device on which heads are trained (%(default)s)")
    heads.add_argument("--seed", type=int, default=0, help="the seed of search and training (%(default)s)")


def options_of(asked: argparse.Namespace, archive: ArchiveLayout) -> TrainingOptions:
    """Return the options that were asked for, with the batch size that an extracted archive is served with.

    Raises:
        ConfigError: the options contradict each other, or a file cannot be read.
    """
    searches, in_service = asked.search in ("nni", "nni-service"), asked.search == "nni-service"
    if asked.service and not in_service:
        raise ConfigError("--service says where --search nni-service runs its trials, but the search is "
                          f"{asked.search}: leave it out, or pass --search nni-service")
    if asked.expose_nni and not in_service:
        raise ConfigError("--expose-nni opens the service of --search nni-service to other machines, but the search is "
                          f"{asked.search}: leave it out, or pass --search nni-service")
    service = Service.load(asked.service, exposed=asked.expose_nni) if asked.service else Service(
        exposed=asked.expose_nni)
    given = asked.space if searches or asked.search == "none" else Path(asked.search)
    config = archived_config(archive)
    return TrainingOptions(
        tolerance=asked.tolerance, confidence=asked.confidence, thresholds=asked.thresholds, risk=asked.risk,
        split=asked.split, measure=asked.cost, batch_size=asked.batch_size or int(config.get("batchSize", 1)),
        engine=ENGINES[ServingConfig.from_model_config(config).engine].identity(archive.folder),
        measure_device=asked.measure_device,
        layers=asked.layers, search=Search(asked.trials, seed=asked.seed) if searches else None,
        service=service if in_service else None,
        space=SearchSpace.load(given) if given else SearchSpace(),
        recipe=Distillation(seed=asked.seed, device=asked.train_device),
        replay=None if asked.replay is None
        else Replay(asked.replay, augmentations=tuple(asked.augment), seed=asked.seed))


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a fraction between 0 and 1, such as 0.02, found {text!r}")
    return value


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)
