"""A host in memory drives a worker in an environment in which TorchServe's packages cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.handler.archive_layout import ArchiveLayout, extract
from early_exit.handler.errors import ArchiveError
from early_exit.handler.protocol import SECRET_VARIABLE
from early_exit.handler.recording.format import list_shards, read_header, read_shard
from early_exit.handler.serving.worker import Worker
from tests.support.host import MemoryHost
from tests.support.models.rows_model import rows_model
from tests.support.plans import write_plan
from tests.support.untried import build_untried

ROOT = Path(__file__).parents[2]
DRIVE = """
import json, os, sys
from pathlib import Path

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ts", "model_archiver"):
            raise ModuleNotFoundError(f"{name} is not to be imported", name=name)

sys.meta_path.insert(0, Refused())
folder, config, bodies = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
os.chdir(folder)
sys.path.insert(0, str(folder))
from early_exit.handler.serving.worker import Worker
from early_exit.handler.call import Call
from tests.support.host import MemoryHost
host = MemoryHost("rows", "1.0", folder=str(folder), batch_size=4, model_config=config)
worker = Worker.load(folder, host)
calls = [Call(f"id-{number}", {"body": body}) for number, body in enumerate(bodies)]
calls.append(Call("probe", {"body": ""}, {"x-early-exit-probe": "1", "x-early-exit-secret": "s"}))
answered = {}
while len(answered) < len(calls):
    waiting = [call for call in calls if call.id not in answered]
    for call, reply in zip(waiting, worker.step(waiting)):
        if reply is not None:
            answered[call.id] = [reply.status, reply.body, reply.headers]
worker.close()
assert not [name for name in sys.modules if name.split(".")[0] in ("ts", "model_archiver")]
print(json.dumps({"code": sys.modules["early_exit.handler.serving.worker"].__file__, "answered": answered,
                  "batch_size_seen": host.context.batch_size_seen, "probe": worker.probe(calls[0]).body["probe"],
                  "metrics": {name: sum(metric.values.values()) for name, metric in host.metrics.items()}}))
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> ArchiveLayout:
    """Return an unpacked archive with exits, at which some rows leave."""
    folder = tmp_path_factory.mktemp("rows")
    torch.manual_seed(0)
    save_file(rows_model().state_dict(), folder / "weights.safetensors")
    source = ArchiveRequest("tests.support.models.rows_model:rows_model", folder, model_name="rows", version="1.0",
                            weights=folder / "weights.safetensors", input_shape=(6,),
                            handler=str(ROOT / "tests" / "support" / "models" / "rows_model.py"))
    plain = build_untried(source)
    with_exits = ArchiveRequest(str(plain), folder, version="2.0",
                                plan=write_plan(folder / "plan", plain, threshold=0.5))
    layout = ArchiveLayout(folder / "unpacked")
    layout.root.mkdir()
    extract(build_archive(with_exits), layout.root)
    return layout


@pytest.mark.parametrize("answers", ["plain", "early"])
def test_a_host_in_memory_gets_answers_exits_records_and_errors_without_torchserve(
        answers: str, archive: ArchiveLayout, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (3 * torch.randn(40, 6, generator=generator)).tolist()
    bodies = [*map(json.dumps, rows), "no numbers", "[1, 2]"]
    config = {"early_exit": {"answers": answers, "records": str(tmp_path), "sampling_rate": 1.0, "control_rate": 0}}
    driven = subprocess.run(
        [sys.executable, "-c", DRIVE, str(archive.root), json.dumps(config), json.dumps(bodies)], text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), SECRET_VARIABLE: "s"},
        capture_output=True, timeout=120, check=False)
    assert driven.returncode == 0, driven.stderr
    seen = json.loads(driven.stdout.splitlines()[-1])
    assert seen["code"] == str(archive.root / "early_exit" / "handler" / "serving" / "worker.py"), "not the archive's"
    assert seen["batch_size_seen"] == 4 and seen["probe"] == "ok"
    answered = seen["answered"]
    assert [answered[f"id-{number}"][0] for number in range(42)] == [200] * 40 + [400] * 2
    assert all(answered[f"id-{number}"][2]["X-Own"] == f"id-{number}" for number in range(40))
    exits = [answered[f"id-{number}"][2]["X-Early-Exit"] for number in range(40)]
    assert len(set(exits)) >= 2 and "full" in exits, "the test needs rows that leave and rows that stay"
    assert seen["metrics"]["answers_total"] == 40 and seen["metrics"]["items_refused_total"] == 2
    [shard, *others] = list_shards(tmp_path)
    header = read_header(shard)
    n_records = sum(len(read_shard(path, header.layers)) for path in [shard, *others])
    assert (header.model, header.version, n_records) == ("rows", "1.0", 40)
    torch.manual_seed(0)
    scores = rows_model()(torch.tensor(rows))
    stays = [number for number in range(40) if exits[number] == "full"]
    assert [answered[f"id-{number}"][1]["class"] for number in stays] == scores[stays].argmax(dim=1).tolist()


def test_a_handler_that_changes_the_weights_is_found_out_when_the_worker_loads(
        archive: ArchiveLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    class Damaging:
        model: torch.nn.Module

        def _load_pickled_model(self) -> torch.nn.Module:
            raise AssertionError("it gets ours")

        def initialize(self, context: Any) -> None:
            self.model = self._load_pickled_model()
            for parameter in self.model.parameters():
                parameter.data.mul_(2)

        def handle(self, data: list[Any], context: Any) -> list[Any]:
            raise AssertionError("it is never asked")

    module = ModuleType("rows_model")
    Damaging.__module__, module.Damaging = module.__name__, Damaging  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(ArchiveError, match="scores are off"):
        Worker.load(archive.root, MemoryHost("rows", folder=str(archive.root)))
