"""The report of a real run: it follows from the run's folder and the archive, and is one page that loads nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from early_exit.handler.archive_layout import MANIFEST, ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.errors import ArchiveError, RecordError
from early_exit.training.data.shards import find_shards
from early_exit.training.heads.distill import Distillation
from early_exit.training.options import TrainingOptions
from early_exit.training.paths import RunPaths
from early_exit.training.pipeline import train
from early_exit.training.report.evaluate import Evaluation, evaluate
from early_exit.training.report.html import html_page
from early_exit.training.report.summary import RunReport, guarantee
from tests.support.residual import N_RECORDS

OPTIONS = TrainingOptions(tolerance=0.05, measure="flops", search=None, recipe=Distillation(epochs=10), batch_size=4)
VOID = {"meta", "path", "circle", "rect"}


@pytest.fixture(scope="module")
def mar(archive: ArchiveLayout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mar") / "files"
    shutil.copytree(archive.root, root)
    (root / MANIFEST).parent.mkdir(exist_ok=True)
    for manifest in (root / MANIFEST, ArchiveLayout(root).original_manifest):
        manifest.write_text(json.dumps({"model": {"modelName": "model", "modelVersion": "2.0"}}))
    zipped = Path(shutil.make_archive(str(root), "zip", root))
    return zipped.rename(zipped.with_name("model-2.0.mar"))


@pytest.fixture(scope="module")
def finished(backbone: Backbone, archive: ArchiveLayout, records: Path, mar: Path,
             tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPaths, RunReport]:
    folder = tmp_path_factory.mktemp("runs")
    labels = torch.randint(4, (N_RECORDS,), generator=torch.Generator().manual_seed(3)).tolist()
    (folder / "labels.csv").write_text("".join(f"request-{row},{label}\n" for row, label in enumerate(labels)))
    run = RunPaths(folder / "run")
    report = train("model", archive, find_shards(records, "model", backbone.description), OPTIONS, run, mar=mar,
                   labels=folder / "labels.csv")
    return run, report


@pytest.fixture(scope="module")
def evaluation(finished: tuple[RunPaths, RunReport]) -> Evaluation:
    return evaluate(finished[0], max_seconds=1)


class Page(HTMLParser):
    """A parser that collects the contents of a page, and fails if tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_report_says_what_the_run_said(finished: tuple[RunPaths, RunReport], evaluation: Evaluation) -> None:
    _, report = finished
    assert evaluation.summary.exits, "this backbone is easy enough to exit from"
    assert evaluation.summary.to_json() == report.to_json()
    assert evaluation.summary.deployed in evaluation.frontier


def test_programs_find_what_they_found_before_in_both_files(evaluation: Evaluation) -> None:
    report, whole = evaluation.summary.to_json(), evaluation.to_json()
    assert set(report) == {"model", "records", "plan", "exits", "heads", "cost_ratio", "flops_ratio", "disagreement",
                           "left_out", "skipped"}
    assert set(report["exits"][0]) == {"layer", "cost", "threshold", "temperature", "head", "hit_rate", "agreement",
                                       "hit_rate_alone"}
    assert set(whole) == {"model", "backbone", "guarantee", "measure", "batch_size", "records", "deployed", "exits",
                          "frontier", "curves", "plain", "with_exits", "latencies", "heads", "left_out", "skipped",
                          "asked"}
    assert set(whole["exits"][0]) == {"layer", "cost", "head", "threshold", "temperature", "alone", "together"}
    assert set(whole["exits"][0]["together"]) == {"hit_rate", "agreement", "accuracy", "effect", "bound", "categories"}
    assert set(whole["deployed"]) == {"thresholds", "cost", "flops", "disagreement", "loss", "accuracy"}
    assert set(whole["heads"][0]) == set(report["heads"][0]) == {
        "layer", "architecture", "n_trials", "agreement", "temperature", "flops_ratio", "used"}


def test_the_frontier_goes_from_no_exit_to_the_most_aggressive(evaluation: Evaluation) -> None:
    first, *others = evaluation.frontier
    assert first.disagreement == 0
    assert others[-1].flops < first.flops
    hits = [1 - point.flops for point in evaluation.frontier]
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(hits)), "lower thresholds let more leave"


def test_latency_memory_and_size_are_measured(evaluation: Evaluation, backbone: Backbone) -> None:
    assert sorted({latency.batch_size for latency in evaluation.latencies if latency.device == "cpu"}) == [1, 4, 8, 32]
    for latency in evaluation.latencies:
        assert latency.repeats >= 3 and latency.plain_ms > 0 and latency.exits_ms > 0
    assert evaluation.plain.parameters == sum(p.numel() for p in backbone.graph.parameters())
    assert evaluation.plain.size_bytes == 4 * evaluation.plain.parameters < evaluation.with_exits.size_bytes
    assert evaluation.with_exits.ltma_bytes > 0


def test_the_page_is_well_formed_and_needs_nothing_else(evaluation: Evaluation) -> None:
    text = html_page(evaluation)
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert "http" not in text and "url(" not in text and "@import" not in text
    named = {attributes.get("id") for _, attributes in page.tags}
    charts = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(charts) == 3 + len(evaluation.curves)
    for attributes in charts:
        assert set(str(attributes["aria-labelledby"]).split()) <= named, "every chart has a title and a summary"


def test_the_page_holds_the_figures(evaluation: Evaluation) -> None:
    page = Page(html_page(evaluation))
    words = " ".join(page.words)
    assert guarantee(evaluation.summary.plan) in words
    for exit in evaluation.summary.exits:
        assert f"{exit.together.hit_rate:.2%}" in words and f"{exit.alone.bound:.2%}" in words
        assert exit.together.categories is not None and f"{exit.together.categories.only_backbone} (" in words
    for latency in evaluation.latencies:
        assert f"{latency.exits_ms:.3f}" in words
    lines = [str(attributes["d"]).count(",") for tag, attributes in page.tags
             if tag == "path" and "series" in str(attributes.get("class")) and attributes["d"] != "M0,4H26"]
    assert lines.count(101) >= len(evaluation.curves), "every hit rate has all its points"


def test_requests_that_could_not_be_run_again_are_told_with_the_reason(evaluation: Evaluation) -> None:
    summary = replace(evaluation.summary, skipped={"their handler fails with <KeyError>": 3})
    assert "  skipped: 3 requests: their handler fails with <KeyError>" in summary.to_text().splitlines()
    assert summary.to_json()["skipped"] == {"their handler fails with <KeyError>": 3}
    words = Page(html_page(replace(evaluation, summary=summary))).words
    assert "3: their handler fails with <KeyError>" in words


def test_a_run_without_exits_has_a_report(backbone: Backbone, archive: ArchiveLayout, records: Path, mar: Path,
                                          tmp_path: Path) -> None:
    shards = find_shards(records, "model", backbone.description)
    options = replace(OPTIONS, tolerance=0.004, recipe=Distillation(epochs=3, learning_rate=1e-3), measure="seconds",
                      layers=2)
    run = RunPaths(tmp_path / "run")
    train("model", archive, shards, options, run, mar=mar)
    evaluation = evaluate(run, max_seconds=0)
    assert evaluation.summary.plan.exits == () and evaluation.summary.deployed.accuracy is None
    Page(html_page(evaluation))


def test_the_papers_rule_has_a_report(backbone: Backbone, archive: ArchiveLayout, records: Path, mar: Path,
                                      tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    train("model", archive, find_shards(records, "model", backbone.description),
          replace(OPTIONS, thresholds="paper", recipe=Distillation(epochs=3), layers=2), run, mar=mar)
    evaluation = evaluate(run, max_seconds=0)
    assert "no guarantee" in guarantee(evaluation.summary.plan)
    Page(html_page(evaluation))


def test_a_moved_archive_has_to_be_given(finished: tuple[RunPaths, RunReport], mar: Path, tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    shutil.copytree(finished[0].root, run.root)
    inputs = json.loads(run.inputs.read_text())
    run.inputs.write_text(json.dumps({**inputs, "archive": str(tmp_path / "gone.mar")}))
    with pytest.raises(ArchiveError, match="not at .*gone.mar, and memory .*: pass its path with --archive"):
        evaluate(run)
    assert evaluate(run, mar, max_seconds=0).summary.exits


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="run.json is missing"):
        evaluate(RunPaths(tmp_path))


def test_a_plan_that_was_changed_is_refused(finished: tuple[RunPaths, RunReport], tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    shutil.copytree(finished[0].root, run.root)
    plan = json.loads(run.plan.read_text())
    plan["exits"][0]["threshold"] = 0.1
    run.plan.write_text(json.dumps(plan))
    with pytest.raises(RecordError, match="does not follow from the figures of its run"):
        evaluate(run)
