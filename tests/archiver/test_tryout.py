"""What `ee-archive` learns from a user's handler by running it, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.sources.form import FormFile
from early_exit.archiver.packaging.tryout import launcher
from early_exit.handler.errors import ArchiveError, EarlyExitError, Unsupported
from tests.support.original import original_mar

MODEL = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"labels": ["cat", "dog", "owl"]}
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))
"""
HANDLER = """
import os, time, torch
from net import Net
from ts.torch_handler.base_handler import BaseHandler

class Handler(BaseHandler):
    def initialize(self, context):
        super().initialize(context)
{initialize}

    def preprocess(self, data):
        return torch.tensor([item["body"] for item in data])

    def inference(self, x):
        with torch.no_grad():
            return self.model(x)

    def postprocess(self, scores):
{postprocess}
"""
PLAIN = "        return scores.tolist()"


class Net(nn.Module):
    """The network of `MODEL`, which provides the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)


@pytest.fixture
def samples(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file, content in zip(files, ([0.1, 0.2, 0.3, 0.4], [-1.0, 2.0, 0.5, -0.5])):
        file.write_text(json.dumps(content))
    return files


def archived(folder: Path, handler: str, samples: list[Path], told: list[str] | None = None, **more: Any
             ) -> dict[str, Any]:
    """Build an archive of that handler, and return what the archive says about the handler."""
    torch.manual_seed(0)
    (folder / "net.py").write_text(MODEL)
    (folder / "their_handler.py").write_text(handler)
    mar = original_mar(folder / "original", "theirs", str(folder / "net.py"), str(folder / "their_handler.py"),
                       Net().state_dict(), "batchSize: 4\n")
    made = build_archive(ArchiveRequest(str(mar), folder / "store", requests=samples, **more),
                         lambda line: (told if told is not None else []).append(line))
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
        return {"names": names, "handler": json.loads(archive.read("early_exit/handler.json")),
                "answers": json.loads(archive.read("early_exit/answers.json")) if "early_exit/answers.json" in names
                else None,
                "samples": json.loads(archive.read("early_exit/samples.json")) if "early_exit/samples.json" in names
                else None}


def test_what_initialize_makes_of_the_model_is_what_is_exported(
        tmp_path: Path, samples: list[Path]) -> None:
    made = archived(tmp_path, HANDLER.format(
        initialize="        self.model = torch.nn.Sequential(self.model, torch.nn.Softmax(1)).eval()",
        postprocess="        return [{'scores': row, 'time': time.time()} for row in scores.tolist()]"), samples)
    assert made["handler"]["loading"] == "own", "a worker compares what initialize() makes of it there"
    assert made["handler"]["rows_per_request"] == 1
    batches = {(tuple(one["samples"]), one["explain"]): one for one in made["answers"]["batches"]}
    assert {samples for samples, _ in batches} == {(0,), (1,), (0, 1), (1, 0)}
    assert batches[(0, 1), False]["unstable"] == [["$.time"], ["$.time"]], "a clock is listed and not compared"


def test_what_torchserve_cannot_write_is_no_answer(tmp_path: Path, samples: list[Path]) -> None:
    with pytest.raises(ArchiveError, match="does not answer the sample request.*503 +Unsupported"):
        archived(tmp_path, HANDLER.format(
            initialize="", postprocess="        return [*scores.numpy().max(1)]"), samples)


def test_a_tensor_that_is_an_answer_is_compared_by_all_of_its_numbers(tmp_path: Path, samples: list[Path]) -> None:
    made = archived(tmp_path, HANDLER.format(
        initialize="", postprocess="        return [*scores.repeat(1, 500)]"), samples)
    first = json.loads(__import__("base64").b64decode(made["answers"]["batches"][0]["answers"][0]["body"]))
    assert len(first) == 1500


def test_weights_that_initialize_reads_from_elsewhere_are_exported_though_the_archive_loads_without_them(
        tmp_path: Path, samples: list[Path]) -> None:
    """The stand-in accepts any state dict if strict=False, so only the answers show the difference."""
    made = archived(tmp_path, HANDLER.format(
        initialize="        self.model.load_state_dict({'head.bias': torch.tensor([9.0, 0.0, 0.0])}, strict=False)",
        postprocess=PLAIN), samples)
    first = json.loads(__import__("base64").b64decode(made["answers"]["batches"][0]["answers"][0]["body"]))
    assert first[0] > 8


def test_the_model_of_a_handler_that_remembers_answers_is_found(tmp_path: Path, samples: list[Path]) -> None:
    made = archived(tmp_path, HANDLER.format(initialize="        self.known = {}", postprocess=PLAIN).replace(
        "return self.model(x)", """return torch.cat([self.known[str(row)] if str(row) in self.known
                              else self.known.setdefault(str(row), self.model(row[None])) for row in x])"""), samples)
    assert made["handler"]["model"] == [{"root": "handler", "steps": [["attribute", "model"]]}]
    assert made["handler"]["rows_per_request"] is None, "of a batch only the new rows reach the model"


def test_a_module_level_handler_keeps_its_model_where_its_names_reach_it(tmp_path: Path, samples: list[Path]) -> None:
    told: list[str] = []
    made = archived(tmp_path, """
import os, torch
from net import Net

MODELS = {}

def handle(data, context):
    if "cats" not in MODELS:
        net = Net()
        folder = context.system_properties["model_dir"]
        net.load_state_dict(torch.load(os.path.join(folder, "weights.pth"), weights_only=True))
        MODELS["cats"] = net.eval()
    if data is None:
        return None
    with torch.no_grad():
        scores = MODELS["cats"](torch.tensor([item["body"] for item in data]))
    return [MODELS["cats"].config["labels"][number] for number in scores.argmax(1).tolist()]
""", samples, told)
    assert made["handler"]["model"] == [{"root": "module", "steps": [["attribute", "MODELS"], ["item", "cats"]]}]
    assert made["handler"]["loading"] == "kept", "it asks its model for .config"
    assert any("weights twice" in line for line in told) and any("original model too" in line for line in told)


@pytest.mark.parametrize(("initialize", "postprocess", "why", "message"), [
    ("        self.model.train(); self.model.body.append(torch.nn.Dropout(0.5))", PLAIN, Unsupported.CHANGES,
     "in training mode, .* each time .body.4."),
    ("", "        self.model.head.bias.data.add_(1)\n        self.model.head.bias.add_(1)\n" + PLAIN,
     Unsupported.CHANGES, r"changes its model while it answers \(head.bias"),
    ("        self.model = torch.jit.trace(self.model, torch.zeros(1, 4))", PLAIN, Unsupported.TORCHSCRIPT,
     "calls a TorchScript model"),
    ("        self.other = Net().eval()", "        return self.other(torch.zeros(len(scores), 4)).tolist()",
     Unsupported.SEVERAL_SCORES, "calls 2 models for a request"),
    ("        self.model.head = torch.nn.Sequential(torch.nn.Linear(8, 500), torch.nn.Linear(500, 20)).eval()\n"
     "        self.top = torch.nn.Linear(20, 3)",
     "        return self.top(scores).tolist()", Unsupported.SEVERAL_SCORES,
     "passes the output of its Net to a Linear"),
])
def test_what_cannot_be_exported_is_refused_with_the_reason(
        tmp_path: Path, samples: list[Path], initialize: str, postprocess: str, why: Unsupported, message: str) -> None:
    postprocess = f"        with torch.no_grad():\n    {postprocess.replace(chr(10), chr(10) + '    ')}"
    with pytest.raises(EarlyExitError, match=message) as refused:
        archived(tmp_path, HANDLER.format(initialize=initialize, postprocess=postprocess), samples)
    assert refused.value.unsupported is why
    assert not (tmp_path / "store").exists()


def test_an_archive_that_answers_otherwise_than_its_original_is_refused_with_both_answers(
        tmp_path: Path, samples: list[Path]) -> None:
    with pytest.raises(ArchiveError, match=r"(?s)differently from the original.*before: 200.*Net.*now:.*StandIn"):
        archived(tmp_path, HANDLER.format(
            initialize="", postprocess="        return [type(self.model).__name__] * len(scores)"), samples)


def test_a_handler_that_needs_more_of_the_output_than_scores_is_refused_with_what_it_is(
        tmp_path: Path, samples: list[Path]) -> None:
    with pytest.raises(ArchiveError, match=r"returns more than its scores \(embedding\)") as refused:
        archived(tmp_path, HANDLER.format(
            initialize="        self.model = Both(self.model).eval()",
            postprocess="        return scores['embedding'].flatten(1).tolist()") + """

def Both(net):
    class Both_(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            embedding = self.net.body(x)
            return {"scores": self.net.head(embedding), "embedding": embedding[:, :, None]}

    return Both_()
""", samples)
    assert refused.value.unsupported is Unsupported.SEVERAL_SCORES


def test_a_request_of_several_parts_is_tried_out_as_the_server_hands_it_over(
        tmp_path: Path, samples: list[Path]) -> None:
    """The handler refuses any option but the given one, so the second request has the same option."""
    (tmp_path / "mode.txt").write_text("fast")
    handler = HANDLER.format(initialize="", postprocess=PLAIN).replace('item["body"]', 'self.row(item)') + """
    def row(self, item):
        assert set(item) == {"row", "mode"} and item["mode"] == "fast", item
        return item["row"]
"""
    made = archived(tmp_path, handler, [], form=[
        FormFile("row", samples[0], None), FormFile("mode", tmp_path / "mode.txt", None)])
    assert made["handler"]["rows_per_request"] == 1
    assert [one["samples"] for one in made["answers"]["batches"]] == [[0], [1], [0, 1], [1, 0]]
    first, second = ([part["name"] for part in parts] for parts in made["samples"]["requests"])
    assert first == second == ["row", "mode"]


def test_without_a_sample_nothing_is_compared_and_it_is_said(tmp_path: Path) -> None:
    told: list[str] = []
    made = archived(tmp_path, HANDLER.format(initialize="", postprocess=PLAIN), [], told, input_shape=(4,))
    assert made["answers"] is None
    assert any("cannot be compared" in line and "--untried" in line for line in told)


def test_backends_that_torchserve_lacks_are_not_reported_to_people() -> None:
    imported = subprocess.run([sys.executable, "-I", launcher.__file__], stdin=subprocess.DEVNULL, text=True,
                              capture_output=True, timeout=120, check=True)
    assert imported.stderr == ""
