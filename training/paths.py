"""The files in the folder of a run. Only this module knows their names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from early_exit.handler.archive_layout import PLAN_FILE


@dataclass(frozen=True)
class TrainingSetPaths:
    """The folder of the records and replays of a run."""

    root: Path

    @property
    def index(self) -> Path:
        """The index of the training set. It is written last, when all other files are complete."""
        return self.root / "index.json"

    @property
    def columns(self) -> Path:
        return self.root / "columns.safetensors"

    @property
    def progress(self) -> Path:
        """The progress of a replay."""
        return self.root / "replayed.json"

    def activations(self, layer: str) -> Path:
        return self.root / (_file_name(layer) + ".npy")


@dataclass(frozen=True)
class RunPaths:
    """The folder of one `ee-train` run."""

    root: Path

    @property
    def inputs(self) -> Path:
        """The inputs and options that the run was started with."""
        return self.root / "run.json"

    @property
    def plan(self) -> Path:
        return self.root / PLAN_FILE

    @property
    def report_json(self) -> Path:
        return self.root / "report.json"

    @property
    def report_text(self) -> Path:
        return self.root / "report.txt"

    @property
    def predictions(self) -> Path:
        """The predictions of the heads for the records that they were not trained on."""
        return self.root / "judged.safetensors"

    @property
    def evaluation(self) -> Path:
        """The figures of `ee-train report`, as JSON."""
        return self.root / "evaluation.json"

    @property
    def report_html(self) -> Path:
        return self.root / "report.html"

    @property
    def profile(self) -> Path:
        """Measured seconds of the backbone's stages and of the exits."""
        return self.root / "profile.json"

    @property
    def remote(self) -> Path:
        """Copies of records from elsewhere."""
        return self.root / "remote"

    @property
    def training_set(self) -> TrainingSetPaths:
        return TrainingSetPaths(self.root / "training_set")

    def head(self, layer: str) -> Path:
        """Return where a trained head is kept."""
        return self.root / "heads" / (_file_name(layer) + ".safetensors")

    def trials(self, layer: str) -> Path:
        """Return the journal of a layer's search: one JSON line per trial."""
        return self.root / "search" / (_file_name(layer) + ".jsonl")

    def trial(self, layer: str, number: int) -> Path:
        """Return where the head of a trial is kept."""
        return self.root / "search" / _file_name(layer) / f"{number}.safetensors"

    def trial_result(self, layer: str, number: int) -> Path:
        """Return where a trial in NNI's service writes its result."""
        return self.root / "search" / _file_name(layer) / f"{number}.json"

    def trial_results(self, layer: str) -> list[int]:
        """Return the numbers of the trials that wrote a result."""
        return [int(path.stem) for path in (self.root / "search" / _file_name(layer)).glob("[0-9]*.json")]

    @property
    def task(self) -> Path:
        """The input of NNI's trials. NNI copies its folder, which holds nothing else, to the machine of a trial."""
        return self.root / "nni" / "task" / "task.json"

    @property
    def experiments(self) -> Path:
        """The folder in which NNI keeps its experiments."""
        return self.root / "nni" / "experiments"

    @property
    def running(self) -> Path:
        """The id and port of the NNI experiment that is running."""
        return self.root / "nni" / "running.json"


def _file_name(layer: str) -> str:
    name = quote(layer, safe="")
    return "%2E" + name[1:] if name.startswith(".") else name  # '..' would be the folder above
