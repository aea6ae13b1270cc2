"""True classes of some requests, with which the loss of accuracy is certified."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.errors import RecordError, TooFewRecordsError
from early_exit.handler.exits.risk import Risk
from early_exit.handler.recording.format import request_hash
from early_exit.training.data.dataset import load_traffic
from early_exit.training.data.shards import find_shards
from early_exit.training.data.split import Part
from early_exit.training.heads.distill import Distillation
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from tests.support.recording import record
from tests.support.residual import N_RECORDS

OPTIONS = TrainingOptions(tolerance=0.05, risk=Risk.ACCURACY, measure="flops", search=None,
                          recipe=Distillation(epochs=10))


def test_too_few_labels_are_said_before_anything_is_trained(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    shards = find_shards(records, "model", backbone.description)
    run = RunPaths(tmp_path / "run")
    traffic = load_traffic(shards)
    certifies = dict(zip(traffic.request.tolist(), (traffic.part == Part.CERTIFY.number).tolist()))
    ids = [f"request-{number}" for number in range(N_RECORDS)]
    of_certify = [request for request in ids if certifies[request_hash(request)]]
    others = [request for request in ids if not certifies[request_hash(request)]]
    for labelled, trouble in (
            (["another"], "none belongs to a record"),
            (others, r"0 of the \d+ records of the certify part .* at least 59 there: label about 197 more requests"),
            (others + of_certify[:50], r"50 of the \d+ records of the certify part .* label about 30 more requests "),
            (of_certify, r"0 of the \d+ records of the tune part have a label, .* label about 5 more")):
        labels = tmp_path / "labels.csv"
        labels.write_text("".join(f"{request},0\n" for request in labelled))
        with pytest.raises(TooFewRecordsError, match=trouble):
            train("model", archive, shards, OPTIONS, run, labels=labels)
    assert not (run.root / "heads").exists()


def test_the_report_of_accuracy_counts_only_records_with_a_label_in_tune_and_certify(
        backbone: Backbone, archive: ArchiveLayout, records: Path, tmp_path: Path) -> None:
    shards = find_shards(records, "model", backbone.description)
    labels = tmp_path / "labels.csv"
    labels.write_text("".join(f"request-{number},0\n" for number in range(0, N_RECORDS, 3)))
    report = train("model", archive, shards, replace(OPTIONS, tolerance=0.5),
                   RunPaths(tmp_path / "run"), labels=labels)
    traffic = load_traffic(shards)
    known = torch.isin(traffic.request, torch.tensor([request_hash(f"request-{n}") for n in range(0, N_RECORDS, 3)]))
    counts = {part.name.lower(): int((traffic.part == part.number).logical_and(known | (part is Part.TRAIN)).sum())
              for part in Part}
    assert report.records == counts and counts["certify"] < (traffic.part == Part.CERTIFY.number).sum()
    assert report.plan.certificate is not None and report.plan.certificate.n <= counts["certify"]


def test_labels_of_repeated_requests_alone_certify_nothing(
        backbone: Backbone, archive: ArchiveLayout, tmp_path: Path) -> None:
    inputs = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    inputs[701::2] = inputs[0]
    record(backbone, inputs, tmp_path / "records")
    labels = tmp_path / "labels.csv"
    labels.write_text("".join(f"request-{number},0\n" for number in [*range(700), *range(701, 1000, 2)]))
    with pytest.raises(RecordError, match="only requests with a label count"):
        train("model", archive, find_shards(tmp_path / "records", "model", backbone.description),
              OPTIONS, RunPaths(tmp_path / "run"), labels=labels)
