"""Makes the 8-bit pieces that the engine openvino-int8 executes, calibrated with recorded requests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.graph import split
from early_exit.handler.engines.openvino import PIECES, convert, import_openvino, in_float32
from early_exit.handler.errors import ConfigError, RecordError
from early_exit.handler.inference.forward import Live
from early_exit.training.data.dataset import load_traffic
from early_exit.training.data.preprocessing import preprocessing
from early_exit.training.data.shards import find_shards, of_traffic, readable_shards
from early_exit.training.data.skipped import Skipped
from early_exit.training.data.split import Part
from early_exit.training.data.traffic import traffic_in

N_SAMPLES = 300
_ATTENTION = (torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten.softmax.int)


def recorded_inputs(records: Path, layout: ArchiveLayout, original: dict[str, Any], backbone: Backbone,
                    skipped: Skipped, log: Callable[[str], None] = lambda line: None) -> Live:
    """Return the (N, ...) inputs that the user's handler makes from recorded requests; N is at most 300.

    The requests are those of the train part, because the requests that certify a plan must not be used for anything
    else.

    Args:
        records: the folder with the records.
        layout: the archive with the user's files.
        original: the manifest that the user's handler expects.
        backbone: the backbone that was recorded.
        skipped: counts the requests on which the handler fails; others are taken in their place.
        log: receives a line for each shard that cannot be read, and for each reason why requests are skipped.

    Raises:
        RecordError: no requests of this backbone were recorded, or the handler fails on all of them.
    """
    name = original["model"]["modelName"]
    shards = readable_shards(find_shards(records, name, backbone.description, log, may_be_renamed=True), log)
    shards = of_traffic(shards, traffic_in(layout, backbone.description), log)
    traffic = load_traffic(shards).of_known_requests()
    is_train = traffic.part == Part.TRAIN.number
    batches: list[Live] = []
    n_tried = n_found = 0
    with preprocessing(layout.root, original) as handler:
        for start, requests in traffic.kept():
            chosen = [request for row, request in enumerate(requests, start) if is_train[row]]
            while chosen and n_found < N_SAMPLES:
                tried, chosen = chosen[:N_SAMPLES - n_found], chosen[N_SAMPLES - n_found:]
                positions, inputs = handler.model_inputs(tried, backbone.description, skipped)
                n_tried, n_found = n_tried + len(tried), n_found + len(positions)
                batches += [inputs] if positions else []
            if n_found >= N_SAMPLES:
                break
    skipped.report(n_tried, log)
    if not batches:
        raise RecordError(f"{records} has no records of {name} in its train part to calibrate with: record more")
    return tuple(torch.cat(parts) for parts in zip(*batches))


def quantize(backbone: Backbone, inputs: Live, folder: Path,
             log: Callable[[str], None] = lambda line: None) -> None:
    """Write the 8-bit pieces of a backbone into a folder below an existing one; earlier pieces are replaced.

    The ranges of the activations are measured on the inputs, piece by piece, in float32.

    Args:
        backbone: the backbone to quantize.
        inputs: (N, ...) tensors, inputs of the backbone like those that it will serve.
        folder: the folder in which the folder of the pieces is made.
        log: receives a line for each piece.

    Raises:
        ConfigError: NNCF or OpenVINO is not installed.
    """
    openvino = import_openvino()
    try:
        logging.getLogger("nncf").setLevel(logging.ERROR)
        import nncf
    except ImportError as error:
        raise ConfigError("to quantize, ee-archive needs the module nncf, which is missing here: install the project "
                          "with its extra 'openvino', as in pip install '.[openvino]' in its folder") from error
    pieces = split(backbone.graph, [layer.node for layer in backbone.description.candidates])
    kind = nncf.ModelType.TRANSFORMER if _has_attention(backbone) else None
    samples: list[Live] = [tuple(x[row:row + 1] for x in inputs) for row in range(len(inputs[0]))]
    target = folder / PIECES
    target.mkdir(exist_ok=True)
    for number, piece in enumerate(pieces):
        log(f"quantizing piece {number + 1} of {len(pieces)} with {len(samples)} requests")
        fed = nncf.Dataset(samples, lambda live: [in_float32(x).numpy() for x in live])
        small = nncf.quantize(convert(piece), fed, subset_size=len(samples), model_type=kind,
                              preset=nncf.QuantizationPreset.PERFORMANCE)
        openvino.save_model(small, target / f"{number:03}.xml", compress_to_fp16=False)
        with torch.no_grad():
            samples = [tuple(x.contiguous() for x in piece(*live)) for live in samples]


def _has_attention(backbone: Backbone) -> bool:
    return any(node.target in _ATTENTION for node in backbone.graph.graph.nodes)
