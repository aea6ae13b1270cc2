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
               f"ee-serve {mar.name} --model-store {mar.parent}, or ee-roll {mar} if a server runs already")
    return 0


def _print_contents(mar: Path, *, as_json: bool, more: Mapping[str, Any]) -> None:
    """Print the contents of an archive; as JSON, together with further data about how it was made."""
    print(json.dumps({**describe(mar), **more}, indent=1) if as_json else in_words(mar))


def show_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line of `ee-archive show`."""
    parser = command_parser("ee-archive show", "Show what is in an early-exit archive.", """
        ee-archive show model-store/cifar-2.0.mar --json""")
    parser.add_argument("archive", type=Path, metavar="FILE.mar", help="the archive to show")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def parser() -> argparse.ArgumentParser:
    """Return the parser of `ee-archive`'s command line."""
    parser = command_parser(
        "ee-archive", "Repackage a model for TorchServe. Without a plan the new archive answers with the whole model "
        "and records; with a plan it exits early. 'ee-archive show FILE.mar' shows what is in an archive.", """
        a .mar that TorchServe serves today, to record:
          ee-archive cifar.mar --input-shape 3,32,32
        the same with exits:
          ee-archive model-store/cifar-2.0.mar --plan runs/first/plan.json
        a model without a .mar:
          ee-archive torchvision.models:resnet50 --weights resnet50.safetensors --input-shape 3,224,224 \\
                     --handler image_classifier --model-name photos
        a text model of two inputs:
          ee-archive review.mar --input input_ids:int64:128 --input attention_mask:int64:128
        a model whose requests have several parts:
          ee-archive ranker.mar --form "image=cat.jpg;type=image/jpeg" --form options=options.json""")
    parser.add_argument("source",
                        help="the model: a .mar, a .tar.gz or a folder that torch-model-archiver made, a factory "
                             "package.module:function, or an exported .pt2")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="the plan.json of an ee-train run")
    parser.add_argument("--version", help="the model version; by default one above the source's")
    parser.add_argument("--to", type=Path, default=Path("model-store"), metavar="FOLDER",
                        help="the folder for the new archive (%(default)s)")
    parser.add_argument("--model-name", metavar="NAME", help="the model name; by default the source's")
    parser.add_argument("--weights", type=Path, metavar="FILE",
                        help="the state dict for a factory, a .safetensors or .pth file")
    parser.add_argument("--input-shape", type=_shape, metavar="C,H,W",
                        help="the shape of one item; by default the shape that the handler makes of a sample request")
    parser.add_argument("--input", type=_input, action="append", default=[], dest="inputs", metavar="NAME:DTYPE:SHAPE",
                        help="name, type and shape of one input of forward, such as input_ids:int64:128; pass it once "
                             "for each input, instead of --input-shape")
    parser.add_argument("--handler", help="for a factory or .pt2: a handler file, or the name of a built-in handler")
    parser.add_argument("--extra-files", type=Path, nargs="*", default=[], metavar="FILE",
                        help="for a factory or .pt2: files to put into the archive")
    parser.add_argument("--config", type=Path, metavar="FILE",
                        help="the model-config.yaml to use instead of the source's")
    parser.add_argument("--engine", choices=list(ENGINES),
                        help=f"the engine that executes the model; by default the source's, or {DEFAULT_ENGINE}")
    calibrated = ", ".join(engine.name for engine in ENGINES.values() if engine.needs_calibration)
    parser.add_argument("--calibrate", type=Path, metavar="RECORDS",
                        help=f"for {calibrated}: the records folder with kept requests, of which at most {N_SAMPLES} "
                             "are used to quantize")
    parser.add_argument("--request", type=Path, action="append", default=[], dest="requests", metavar="FILE",
                        help="the body of a typical request, which the archive keeps as its sample; pass two that "
                             "differ, so that ee-archive can see how the handler orders several requests")
    add_form_option(parser)
    parser.add_argument("--content-type", metavar="TYPE",
                        help="the content type of the bodies; by default the file names tell it")
    parser.add_argument("--service-envelope", choices=ENVELOPES, metavar="NAME",
                        help="the service_envelope of your server's config.properties, if it has one: "
                             f"{', '.join(ENVELOPES)}")
    parser.add_argument("--output", metavar="NAME",
                        help="the name or index of the class scores in the model's output, where several outputs "
                             "could be the scores")
    parser.add_argument("--strategy", type=Strategy, choices=list(Strategy), metavar="STRATEGY",
                        help="for a detector: how the class of an image is defined, "
                             f"{', '.join(strategy.value for strategy in Strategy)} ({Strategy.OBJECT.value})")
    parser.add_argument("--pedestrian", type=int, default=PEDESTRIAN, metavar="LABEL",
                        help="for a detector: the label of pedestrians (%(default)s, COCO's person)")
    parser.add_argument("--json", action="store_true", help="print what is in the archive as JSON")
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
