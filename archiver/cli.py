"""`ee-archive`: repackage a model so that TorchServe serves it with records and early exits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from early_exit.archiver.archive import ArchiveRequest, build_archive
from early_exit.archiver.inspect import describe, in_words
from early_exit.handler.engine import DEFAULT_ENGINE, ENGINES
from early_exit.handler.errors import EarlyExitError
from early_exit.handler.signature import InputSpec


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ee-archive`; return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _show(given[1:]) if given[:1] == ["show"] else _build(given)
    except (EarlyExitError, FileNotFoundError) as error:
        print(f"ee-archive: {error}", file=sys.stderr)
        return 1


def _show(given: list[str]) -> int:
    parser = argparse.ArgumentParser("ee-archive show", description="Tell what is in an early-exit archive.")
    parser.add_argument("archive", type=Path, metavar="FILE.mar")
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args(given)
    print(json.dumps(describe(options.archive), indent=1) if options.json else in_words(options.archive))
    return 0


def _build(given: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "ee-archive", description="Repackage a model for TorchServe: without a plan it answers in full and records, "
        "with one it exits early. 'ee-archive show FILE.mar' tells what is in an archive.")
    parser.add_argument("source", help="an existing .mar with an eager model, package.module:function, or a .pt2")
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
    parser.add_argument("--request", type=Path, help="body of a typical request, used as the sample")
    options = parser.parse_args(given)
    target = build_archive(ArchiveRequest(**{**vars(options), "inputs": tuple(options.inputs)}),
                           lambda line: print(f"ee-archive: {line}", file=sys.stderr))
    print(in_words(target))
    return 0


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
