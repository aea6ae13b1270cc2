"""When answers leave TorchServe: a plain backbone, exits with plain batching, and exits with early answers.

    python -m tests.benchmarks.answers --json FILE

Part (a) is ResNet-50 at 224 px on JPEG photos, with untrained heads and thresholds that let 10, 60 and 12 % of the
photos leave after layers 1 to 3. Part (b) is ResNet-18 (width 32) on CIFAR-10 requests with a certified plan. Each part
is measured under 1, 8 and 32 closed-loop clients, and under requests that arrive at random at 0.7 of the rate that the
plain backbone can answer. The three modes are models of one server with one worker each, and take turns under every
load. They have the same engine and batch size, and neither shadow samples nor control batches, as the rows say again.
`plain` is ours without exits.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from safetensors.torch import save_file

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.handler.allocator import restart_with_allocator
from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.backbone.graph import split
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.exits.head import Head, HeadSpec
from early_exit.handler.exits.plan import ExitPlan, PlannedExit, save_plan
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.training.command import raise_on_terminate
from early_exit.training.data.preprocessing import preprocessing
from early_exit.training.data.shards import find_shards
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from tests.benchmarks.report import conditions, save
from tests.benchmarks.subjects import resnet18
from tests.support.cifar import DataMissing, data_folder, load_requests
from tests.support.client import Reply, failed, latency_ms, send, send_openly
from tests.support.recording import prepared

BATCH = 8
SAME = {"batch_size": BATCH, "control_rate": 0.0, "sampling_rate": 0.0}
"""The settings that all modes share. At most `batch_size` requests are with the worker at a time."""
CONFIG = ("minWorkers: 1\nmaxWorkers: 1\nbatchSize: {batch_size}\nmaxBatchDelay: 5\nresponseTimeout: 300\nearly_exit:\n"
          "  control_rate: {control_rate}\n  sampling_rate: {sampling_rate}\n{more}")
MODES = {"plain": "  exits: false\n", "batched": "", "early": "  answers: early\n"}
CLIENTS = (1, 8, 32)
OPEN_LOAD = 0.7
SCRIPT = {"layer1.2": 0.10, "layer2.3": 0.60, "layer3.5": 0.12}
SPEC = HeadSpec(pool=4, widths=(64,))


def main() -> int:
    parser = argparse.ArgumentParser(description="When answers leave.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--requests", type=int, nargs=2, default=(160, 2400), metavar=("A", "B"),
                        help="for each load and mode, in (a) and (b) (%(default)s)")
    options = parser.parse_args()
    restart_with_allocator()
    raise_on_terminate()
    run = conditions({**vars(options), **SAME, "open_load": OPEN_LOAD})
    rows: list[dict[str, Any]] = []
    for part, prepare, count in (("a", photos, options.requests[0]), ("b", cifar, options.requests[1])):
        try:
            with tempfile.TemporaryDirectory() as scratch:
                source, plan, bodies = prepare(Path(scratch))
                found = measure(part, Path(scratch), source, plan, bodies, count)
        except DataMissing as missing:
            print(missing, file=sys.stderr)
            return 1
        rows += found
        save(options.json, run, summary(rows))
    print(json.dumps(summary(rows), indent=1))
    return 0


def photos(folder: Path) -> tuple[Path, Path, list[bytes]]:
    """Return an archive of ResNet-50, a plan whose exits let the scripted shares of photos leave, and the photos."""
    files = sorted((data_folder() / "imagenet1k-sample").glob("*.jpg"))[:160]
    bodies = [file.read_bytes() for file in files]
    torch.manual_seed(0)
    save_file(torchvision.models.resnet50(weights=None).state_dict(), folder / "resnet50.safetensors")
    archive = build_archive(ArchiveRequest(
        "torchvision.models:resnet50", folder / "original", weights=folder / "resnet50.safetensors",
        model_name="photos", handler="image_classifier", input_shape=(3, 224, 224), requests=[files[0]]))
    return archive, scripted_plan(folder, archive, bodies), bodies


def scripted_plan(folder: Path, archive: Path, bodies: Sequence[bytes]) -> Path:
    """Write a plan with untrained heads at the scripted layers; return its path."""
    layout = ArchiveLayout(folder / "extracted")
    extract(archive, layout.root)
    backbone = load_backbone(layout.folder)
    layers = [backbone.description.layer(path) for path in SCRIPT]
    heads = {layer.path: Head(SPEC, layer.shape, backbone.description.n_classes).eval() for layer in layers}
    parts = split(backbone.graph, [layer.node for layer in layers])
    exits, travelling = [], torch.ones(len(bodies), dtype=torch.bool)
    with preprocessing(layout.root, json.loads(layout.original_manifest.read_text())) as handler, torch.no_grad():
        confidences = []
        for start in range(0, len(bodies), BATCH):
            [x], row = prepared(handler, bodies[start:start + BATCH], backbone.description), []
            for layer, part in zip(layers, parts):
                (x,) = part(x)
                row.append(heads[layer.path](x).softmax(dim=1).amax(dim=1))
            confidences.append(torch.stack(row, dim=1))
    for layer, confidence, share in zip(layers, torch.cat(confidences).T, SCRIPT.values()):
        last, next_one = confidence[travelling].sort(descending=True).values[
            round(share * len(bodies)) - 1:round(share * len(bodies)) + 1].tolist()
        threshold = (last + next_one) / 2
        travelling &= confidence < threshold
        exits.append(PlannedExit(layer.path, SPEC, ConfidencePolicy(1.0, threshold), layer.cost, 0.001))
    save_plan(folder, ExitPlan(backbone.description.sha256, "paper", tuple(exits), None, engine="folded"), heads)
    return folder / "plan.json"


def cifar(folder: Path) -> tuple[Path, Path, list[bytes]]:
    """Return an archive of ResNet-18, a plan certified on 5,000 CIFAR-10 requests, and the other requests."""
    subject = resnet18(folder)
    run = RunPaths(folder / "run")
    train("cifar", subject.archive, find_shards(subject.records, "model", subject.backbone.description),
          TrainingOptions(search=None, batch_size=BATCH), run)
    return next((folder / "store").glob("*.mar")), run.plan, load_requests()[0][5000:]


def measure(part: str, folder: Path, source: Path, plan: Path, bodies: list[bytes], count: int) -> list[dict[str, Any]]:
    """Serve the three modes side by side and return a row for each load and mode."""
    store = folder / "modes"
    archives = []
    for mode, more in MODES.items():
        config = folder / f"{mode}.yaml"
        config.write_text(CONFIG.format(**SAME, more=more))
        archives.append(build_archive(ArchiveRequest(str(source), store, plan=plan, model_name=mode, config=config)))
    sent = [bodies[number % len(bodies)] for number in range(count)]
    with TorchServe(store, folder / "state", Addresses.free(), models=[one.name for one in archives]) as server:
        for mode in MODES:
            send(server, mode, sent[:2 * BATCH])
        rows = [row for clients in CLIENTS
                for row in _under(part, f"{clients} clients", lambda mode, some, clients=clients: send(  # type: ignore[misc]
                    server, mode, some, clients=min(clients, len(some))), sent)]
        capacity = next(row["requests_per_s"] for row in rows if row["load"] == "8 clients" and row["mode"] == "plain")
        rows += _under(part, f"Poisson at {OPEN_LOAD:.0%} of plain", lambda mode, some: send_openly(
            server, mode, some, OPEN_LOAD * capacity, seed=len(some)), sent)
    return rows


def _under(part: str, load: str, run: Callable[[str, Sequence[bytes]], list[Reply]],
           bodies: Sequence[bytes]) -> list[dict[str, Any]]:
    """Put every mode under a load; return a row for each. The modes take turns with a quarter of the requests each."""
    quarter = -(-len(bodies) // 4)
    replies: dict[str, list[Reply]] = {mode: [] for mode in MODES}
    seconds = dict.fromkeys(MODES, 0.0)
    for number, start in enumerate(range(0, len(bodies), quarter)):
        for mode in [*MODES][number % 3:] + [*MODES][:number % 3]:
            began = time.perf_counter()
            replies[mode] += run(mode, bodies[start:start + quarter])
            seconds[mode] += time.perf_counter() - began
    return [{
        "part": part, "load": load, "mode": mode, **SAME, "requests": len(found), "failed": failed(found),
        **{f"p{round(100 * quantile)}_ms": latency_ms(found, quantile) for quantile in (0.5, 0.95, 0.99)},
        "requests_per_s": len(found) / seconds[mode],
        "p50_ms_by_exit": {name: 1000 * median(reply.latency_s for reply in found if reply.exit == name)
                           for name in sorted({reply.exit for reply in found})},
        "hits": {name: sum(reply.exit == name for reply in found) / len(found)
                 for name in sorted({reply.exit for reply in found})}} for mode, found in replies.items()]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures that the project is held to, mostly on part (a), and all rows."""
    def ratio(figure: str, mode: str, to: str, part: str) -> float:
        pairs = [({row["mode"]: row[figure] for row in rows if (row["part"], row["load"]) == (part, load)})
                 for load in dict.fromkeys(row["load"] for row in rows if row["part"] == part)]
        return max((pair[mode] / pair[to] for pair in pairs), default=float("nan"))

    alone = {row["mode"]: row for row in rows if (row["part"], row["load"]) == ("a", "1 clients")}
    late = [alone[mode]["p50_ms_by_exit"]["full"] for mode in ("early", "batched")]
    return {"early_p50_ratio": ratio("p50_ms", "early", "plain", "a"),
            "early_p99_ratio": ratio("p99_ms", "early", "plain", "a"),
            "step_overhead_ms": (late[0] - late[1]) / len(SCRIPT),
            "batched_p50_ratio": ratio("p50_ms", "batched", "plain", "a"),
            **{f"early_to_batched_{quantile}_ratio_a": ratio(f"{quantile}_ms", "early", "batched", "a")
               for quantile in ("p50", "p95")},
            "early_to_batched_p50_ratio_b": ratio("p50_ms", "early", "batched", "b"), "rows": rows}


if __name__ == "__main__":
    sys.exit(main())
