"""`ee-archive`: repackage a model so that TorchServe serves it with records and early exits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.describe import describe, in_words
from early_exit.archiver.packaging.quantize import N_SAMPLES
from early_exit.archiver.packaging.request import ENVELOPES, ArchiveRequest
from early_exit.archiver.packaging.sources.detector import PEDESTRIAN
from early_exit.archiver.packaging.sources.form import add_form_option
from early_exit.handler.backbone.image_class import Strategy
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.engines.registry import DEFAULT_ENGINE, ENGINES
from early_exit.training.command import command_parser, log_to_stderr, print_next, run_command
from early_exit.training.data.skipped import Skipped


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ee-archive`; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    work, options = (_show, show_parser().parse_args(arguments[1:])) if arguments[:1] == ["show"] else (
        _build, parser().parse_args(arguments))
    return run_command("ee-archive", lambda: work(options))


def _show(options: argparse.Namespace) -> int:
    _print_contents(options.archive, as_json=options.json, more={})
    return 0


def _build(options: argparse.Namespace) -> int:
    values = {field.name: getattr(options, field.name) for field in fields(ArchiveRequest)}
    skipped = Skipped()
    mar = build_archive(ArchiveRequest(**{**values, "inputs": tuple(options.inputs)}),
                        lambda line: log_to_stderr(f"ee-archive: {line}"), skipped)
    _print_contents(mar, as_json=options.json, more={"skipped": skipped.counts} if options.calibrate else {})
    print_next(f"ee-roll {mar}" if options.plan else
               f"ee-serve {mar.name} --model-store {mar.parent}, or ee-roll {mar} where a server runs")
    return 0


def _print_contents(mar: Path, *, as_json: bool, more: Mapping[str, Any]) -> None:
    """Print what is in an archive; as JSON with more that is known of how it was made."""
    print(json.dumps({**describe(mar), **more}, indent=1) if as_json else in_words(mar))


def show_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line of `ee-archive show`."""
    parser = command_parser("ee-archive show", "Tell what is in an early-exit archive.", """
        ee-archive show model-store/cifar-2.0.mar --json""")
    parser.add_argument("archive", type=Path, metavar="FILE.mar")
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


def parser() -> argparse.ArgumentParser:
    """Return the parser of `ee-archive`'s command line."""
    parser = command_parser(
        "ee-archive", "Repackage a model for TorchServe: without a plan it answers in full and records, with one it "
        "exits early. 'ee-archive show FILE.mar' tells what is in an archive.", """
        a .mar that TorchServe serves today, to record:
          ee-archive cifar.mar --input-shape 3,32,32
        the same with exits:
          ee-archive model-store/cifar-2.0.mar --plan runs/first/plan.json
        a model without a .mar:
          ee-archive torchvision.models:resnet50 --weights resnet50.safetensors --input-shape 3,224,224
                     --handler image_classifier --model-name photos
        a text model of two inputs:
          ee-archive review.mar --input input_ids:int64:128 --input attention_mask:int64:128
        one whose requests have several parts:
          ee-archive ranker.mar --form "image=cat.jpg;type=image/jpeg" --form options=options.json""")
    parser.add_argument("source", help="an existing .mar, .tar.gz or folder of torch-model-archiver, "
                        "package.module:function, or a .pt2")
    parser.add_argument("--plan", type=Path, help="plan.json of an ee-train run")
    parser.add_argument("--version", help="model version; by default one above the source's")
    parser.add_argument("--to", type=Path, default=Path("model-store"), help="folder for the archive (%(default)s)")
    parser.add_argument("--model-name", help="by default the source's")
    parser.add_argument("--weights", type=Path, help="state dict for a factory: .safetensors or .pth")
    parser.add_argument("--input-shape", type=_shape, metavar="C,H,W",
                        help="one item's shape; by default what the handler makes of a sample request")
    parser.add_argument("--input", type=_input, action="append", default=[], dest="inputs", metavar="NAME:DTYPE:SHAPE",
                        help="instead, once for each input of forward: input_ids:int64:128")
    parser.add_argument("--handler", help="for a factory or .pt2: a handler file or a built-in name")
    parser.add_argument("--extra-files", type=Path, nargs="*", default=[], help="for a factory or .pt2")
    parser.add_argument("--config", type=Path, help="model-config.yaml to use instead of the source's")
    parser.add_argument("--engine", choices=list(ENGINES),
                        help=f"how the model is executed; by default the source's, at first {DEFAULT_ENGINE}")
    calibrated = ", ".join(engine.name for engine in ENGINES.values() if engine.needs_calibration)
    parser.add_argument("--calibrate", type=Path, metavar="RECORDS",
                        help=f"for {calibrated}: records folder with requests, of which at most {N_SAMPLES} are used")
    parser.add_argument("--request", type=Path, action="append", default=[], dest="requests", metavar="FILE",
                        help="body of a typical request, which the archive keeps as its sample; give two that differ, "
                             "so that it is seen how the handler orders several")
    add_form_option(parser)
    parser.add_argument("--content-type", metavar="TYPE",
                        help="of the bodies; by default what the names of their files say")
    parser.add_argument("--service-envelope", choices=ENVELOPES, metavar="NAME",
                        help="of your server's config.properties, where it has one, in which the requests come: "
                             f"{', '.join(ENVELOPES)}")
    parser.add_argument("--output", metavar="NAME",
                        help="name or index of the scores in what the model returns, where several could be them")
    parser.add_argument("--strategy", type=Strategy, choices=list(Strategy), metavar="STRATEGY",
                        help="for a detector, what an image's class is: "
                             f"{', '.join(strategy.value for strategy in Strategy)} ({Strategy.OBJECT.value})")
    parser.add_argument("--pedestrian", type=int, default=PEDESTRIAN, metavar="LABEL",
                        help="of a detector (%(default)s, COCO's person)")
    parser.add_argument("--json", action="store_true", help="tell for machines what is in the archive")
    return parser


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected sizes such as 3,224,224, found {text!r}")
    return shape


def _input(text: str) -> InputSpec:
    name, _, rest = text.partition(":")
    dtype, _, shape = rest.partition(":")
    if not name.isidentifier() or not isinstance(getattr(torch, dtype or "-", None), torch.dtype):
        raise argparse.ArgumentTypeError(f"expected NAME:DTYPE:SHAPE such as input_ids:int64:128, found {text!r}")
    return InputSpec(name, _shape(shape), dtype)
