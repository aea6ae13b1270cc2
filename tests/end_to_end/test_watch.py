"""The watch loop against a real TorchServe: a first plan, an alarm, a fallback level, a renewed plan, a rollback."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.tokens import read_token
from early_exit.archiver.watch.cli import main
from early_exit.archiver.watch.lock import only_watcher
from early_exit.archiver.watch.triggers import Terms
from early_exit.archiver.watch.watched import Watched
from early_exit.archiver.watch.watcher import Watcher
from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.monitor.monitored import Monitored
from early_exit.handler.monitor.shared_state import SharedMonitor, monitor_file
from early_exit.handler.recording.format import ShardHeader, list_shards
from early_exit.training.heads.distill import Distillation
from early_exit.training.options import TrainingOptions
from tests.support.client import Reply, failed, metrics, send
from tests.support.corrupt import corrupted
from tests.support.digits import traffic
from tests.support.documents import DOCUMENTS, ROOT
from tests.support.foreign import open_to_others, open_umask
from tests.support.rewritten import renumbered
from tests.support.shadow_samples import samples_of
from tests.support.untried import build_untried

pytestmark = pytest.mark.slow

CONFIG = ("minWorkers: 1\nmaxWorkers: 1\nbatchSize: 8\nmaxBatchDelay: 5\n"
          "early_exit:\n  seal_after_s: 1\n  sampling_rate: 0.5\n  control_rate: 0\n")
TOLERANCE = 0.05
OPTIONS = TrainingOptions(tolerance=TOLERANCE, measure="flops", layers=4, search=None, recipe=Distillation(epochs=5))


@pytest.fixture(scope="module")
def server(recorder_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    folder = tmp_path_factory.mktemp("watched")
    (folder / "store").mkdir()
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    build_untried(ArchiveRequest(str(recorder_mar), folder / "store", version="2.0", config=config))
    (folder / "state").mkdir(mode=0o700)
    # Log4j would read this file, and log its own work, if the folder were on Java's class path.
    (folder / "state" / "log4j2.component.properties").write_text("log4j2.debug=true\n")
    with open_umask(), TorchServe(folder / "store", folder / "state", Addresses.free(), records=folder / "records",
                                  models=["digits-2.0.mar"]) as running:
        yield running


@pytest.fixture(scope="module")
def watched(server: TorchServe) -> Watched:
    folder = server.state.parent
    return Watched("digits", [Management(server.addresses, server.key_file, server.secret_file)], folder / "store",
                   [str(folder / "records")], folder / "watch", lambda archive: OPTIONS, None,
                   Terms(TOLERANCE, 0.05, 30 * 24 * 3600.0), trial_samples=30, longest_batch_s=1.0)


def serve(server: TorchServe, bodies: list[bytes]) -> list[Reply]:
    """Send requests, and wait until the records of their shadow samples are on disk."""
    replies = send(server, "digits", bodies)
    assert failed(replies) == 0
    time.sleep(2.5)
    return replies


def last(watched: Watched) -> dict[str, Any]:
    return watched.audit.read()[-1]


def clean(count: int, seed: int) -> list[bytes]:
    return [one.body for one in traffic(count, seed)]


def drifted(count: int, seed: int) -> list[bytes]:
    return [corrupted(body, "contrast", 0.5) for body in clean(count, seed)]


def alarm(server: TorchServe, watched: Watched) -> None:
    """Simulate another worker of the served version whose shadow samples were all answered wrongly."""
    standing = Watcher(watched).look()
    assert standing.plan is not None and standing.plan.certificate is not None
    header = ShardHeader("digits", standing.version, standing.backbone.sha256, None, ())
    path = monitor_file(header.folder(server.state.parent / "records"), standing.version, standing.plan)
    other = SharedMonitor(Monitored.of(standing.plan.certificate), len(standing.plan.safer) + 1, path)
    other.note(samples_of([1.0] * 200))
    other.close()
    time.sleep(2)  # every worker reads the state once a second


def test_a_look_that_finds_nothing_to_do_says_so(
        server: TorchServe, watched: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--once", *options(server, watched)]) == 0
    assert "nothing to do" in capsys.readouterr().err and watched.audit.read() == []


def test_a_backbone_without_a_plan_gets_one_though_a_shard_is_damaged(server: TorchServe, watched: Watched) -> None:
    watcher = Watcher(watched)
    serve(server, clean(1500, seed=20))
    whole = list_shards(server.state.parent / "records")[0]
    whole.with_name("half.safetensors").write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(KeyboardInterrupt):  # this watcher is ended in the middle of its attempt
        Watcher(replace(watched, options=interrupted)).tick()
    watcher.tick()
    events = watched.audit.read()
    assert [event["event"] for event in events] == ["attempt", "attempt", "rolling", "rolled"], events
    assert events[0]["reason"] == events[1]["reason"] == "backbone" and events[0]["run"] == events[1]["run"]
    assert not list(watched.state.rglob("*.npy")), "the run's copy of the records is gone"
    assert events[-1]["new"]["certificate"]["bound"] == TOLERANCE
    assert {reply.version for reply in serve(server, clean(20, seed=21))} == {"3.0"}


def interrupted(archive: ArchiveLayout) -> TrainingOptions:
    raise KeyboardInterrupt


def test_what_passes_its_trial_is_accepted(server: TorchServe, watched: Watched) -> None:
    watcher = Watcher(watched)
    watcher.tick()
    assert last(watched)["event"] == "rolled", "too few samples for a verdict"
    serve(server, clean(150, seed=22))
    watcher.tick()
    assert last(watched)["event"] == "accepted" and last(watched)["samples"] >= 30
    watcher.tick()
    assert last(watched)["event"] == "accepted", "nothing more to do"


def test_when_a_worker_alarms_the_others_step_back_by_themselves(server: TorchServe, watched: Watched) -> None:
    assert any(reply.exit != "full" for reply in serve(server, clean(50, seed=23)))
    alarm(server, watched)
    serve(server, clean(20, seed=28))
    standing = Watcher(watched).look()
    assert standing.first_alarm is not None
    (state,) = (server.state.parent / "records").rglob("monitor-3.0-*.json")
    assert json.loads(state.read_text())["certificate"] == "void"
    assert "ALARM" in (server.state / "logs" / "model.log").read_text()
    token = {"Authorization": f"Bearer {read_token(server.key_file, 'inference')}"}
    answer = requests.post(f"{server.addresses.inference}/predictions/digits", data=clean(1, seed=27)[0], headers=token,
                           timeout=10)
    assert int(answer.headers["X-Early-Exit-Step"].split(" of ")[0]) >= 1
    steps = [line for line in metrics(server).splitlines() if line.startswith("ee_monitor_step{")]
    assert any(float(line.rsplit(" ", 1)[1]) >= 1 for line in steps), steps


ONLY_IN_TROUBLE = {"ee_rows_unknown"}
"""Metrics that a worker sends only in trouble, since a sound worker would overwrite them; see `test_inputs`."""


def test_every_metric_that_the_dashboard_or_a_document_names_is_there_and_needs_no_token(server: TorchServe) -> None:
    asked = set(dashboard_labels())
    told = {name for document in DOCUMENTS for name in re.findall(r"\bee_\w+", document.read_text())}
    assert len(asked) > 10 and len(told) > 10
    text = requests.get(f"{server.addresses.metrics}/metrics", timeout=10).text
    found = {line.partition("{")[0].partition(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    found |= {name.removesuffix("_bucket") for name in found}  # the name of the histogram itself
    assert asked | told <= found | ONLY_IN_TROUBLE, sorted((asked | told) - found)
    labels: dict[str, set[str]] = defaultdict(set)
    for name, inside in re.findall(r"^(\w+){(.*)}", text, flags=re.MULTILINE):
        labels[name] |= set(re.findall(r'(\w+)="', inside))
    missing = {name: wanted - labels[name] for name, wanted in dashboard_labels().items() if wanted - labels[name]}
    assert not missing, missing


def dashboard_labels() -> dict[str, set[str]]:
    """Return the labels that the dashboard needs of each metric that it queries."""
    dashboard = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())
    wanted: dict[str, set[str]] = defaultdict(set)
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            [(name, label)] = re.findall(r"^label_values\((\w+), (\w+)\)$", variable["query"]["query"])
            wanted[name].add(label)
    for target in (target for panel in dashboard["panels"] for target in panel["targets"]):
        grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \((.*?)\)", target["expr"]))))
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= grouped, target
        for name, selected in re.findall(r"\b((?:ee|ts)_\w+){(.*?)}", target["expr"]):
            wanted[name] |= grouped | set(re.findall(r'(\w+)="', selected))
    return wanted


def test_a_renewed_plan_is_certified_on_the_new_traffic(server: TorchServe, watched: Watched) -> None:
    watcher = Watcher(watched)
    serve(server, drifted(1600, seed=24))
    watcher.tick()
    events = watched.audit.read()
    states = [file.read_text() for file in (server.state.parent / "records").rglob("monitor-*.json")]
    assert [event["event"] for event in events if event.get("reason") == "alarm"] == ["attempt"], (states, events[-1])
    assert events[-1]["event"] == "rolled", events[-1]


def test_what_alarms_on_trial_is_taken_back(server: TorchServe, watched: Watched) -> None:
    """It is taken back even if a watcher ended, or failed, before it had done so."""
    alarm(server, watched)
    archive = watched.store / "digits-3.0.mar"
    archive.rename(watched.store / "away")
    watcher = Watcher(watched)
    watcher.tick()
    assert [event["event"] for event in watched.audit.read()[-2:]] == ["taking back", "trouble"]
    (watched.store / "away").rename(archive)
    Watcher(watched).tick()
    events = watched.audit.read()
    assert [event["event"] for event in events[-3:]] == ["taking back", "trouble", "rolled back"], events[-3:]
    assert events[-3]["alarms"][0]["mean_loss"] > TOLERANCE
    assert [one.version for one in watched.servers[0].versions("digits")] == ["3.0"]
    assert {reply.version for reply in serve(server, clean(20, seed=26))} == {"3.0"}


def test_a_roll_that_the_server_refuses_to_the_last_leaves_no_version_and_no_archive(
        server: TorchServe, watched: Watched, tmp_path: Path) -> None:
    served = shutil.copy(watched.store / "digits-3.0.mar", tmp_path)
    renumbered(served, tmp_path / "digits-90.0.mar", "3.0", "90.0")  # the server's own store does not have it
    elsewhere = replace(watched, store=tmp_path, state=tmp_path / "watch")
    elsewhere.audit.append("rolling", version="90.0", archive="digits-90.0.mar", replaces="3.0", tries=2, why="-",
                           replaced_archive="digits-3.0.mar", new=None, current=None, current_cost_now=None)
    Watcher(elsewhere).tick()
    assert [event["event"] for event in elsewhere.audit.read()] == ["rolling", "rolling", "roll failed", "given up"]
    assert [one.version for one in watched.servers[0].versions("digits")] == ["3.0"]
    assert [mar.name for mar in tmp_path.glob("*.mar")] == ["digits-3.0.mar"]


def test_whatever_the_umask_keys_records_and_runs_are_for_their_user_alone(
        server: TorchServe, watched: Watched) -> None:
    records = server.state.parent / "records"
    assert server.key_file.stat().st_mode & 0o777 == 0o600
    for folder in (server.state, server.state / "logs", server.state / "tmp", records, watched.state):
        assert folder.stat().st_mode & 0o777 == 0o700, folder
    assert [path.name for path in open_to_others(records)] == ["half.safetensors"], "written by a test"
    assert open_to_others(watched.state) == []
    assert list(records.rglob("monitor-*.json")) and list(watched.state.rglob("plan.json"))


def test_the_server_reads_no_code_and_no_settings_from_the_folder_it_is_started_in(server: TorchServe) -> None:
    assert "StatusLogger" not in (server.state / "logs" / "server.out").read_text()


def options(server: TorchServe, watched: Watched) -> list[str]:
    return ["digits", "--records", *watched.sources, "--model-store", str(watched.store), "--state", str(watched.state),
            "--server", f"{server.addresses.inference},{server.addresses.management}", "--tokens",
            str(server.key_file), "--tolerance", str(TOLERANCE)]


@pytest.mark.parametrize("asked", ["status", "--dry-run"])
def test_status_and_dry_run_tell_where_things_stand_and_change_nothing(
        asked: str, server: TorchServe, watched: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    before = watched.audit.path.read_bytes()
    assert main([asked, *options(server, watched)]) == 0
    told = capsys.readouterr().out
    assert "void since" in told and "rolled back" in told
    assert watched.audit.path.read_bytes() == before


def test_only_one_watcher_watches_a_model(server: TorchServe, watched: Watched) -> None:
    command = [sys.executable, "-m", "early_exit.archiver.watch.__main__", "--once", *options(server, watched)]
    with only_watcher(watched.store / ".ee-watch-digits.lock"):
        refused = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 1 and "another ee-watch" in refused.stderr


def test_a_watcher_gets_itself_new_tokens_when_its_own_have_expired(server: TorchServe, watched: Watched) -> None:
    keys = json.loads(server.key_file.read_text())
    keys["management"]["key"] = "expired"
    server.key_file.write_text(json.dumps(keys))
    assert Watcher(watched).look().version == "3.0"
    assert json.loads(server.key_file.read_text())["management"]["key"] != "expired"


def test_a_server_that_is_down_is_noted_once_and_the_watch_goes_on(server: TorchServe, watched: Watched) -> None:
    down = Watcher(replace(watched, servers=[Management(Addresses.free(), None)]))
    n_events = len(watched.audit.read())
    down.tick()
    down.tick()
    assert len(watched.audit.read()) == n_events + 1 and last(watched)["event"] == "trouble"
