"""Versions that no monitor watches: `ee-archive` warns, `ee-watch` renews none, and takes one back that is on trial."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.watch.cli import main
from early_exit.archiver.watch.status import ModelStatus
from early_exit.archiver.watch.watcher import Watcher
from early_exit.handler.config import ServingConfig
from early_exit.handler.monitor.sequential_test import MonitorState
from tests.archiver.test_renewal import SERVED, Training, WatcherOfSights, decisions, rolled, seen, watcher
from tests.archiver.test_triggers import CERTIFICATE
from tests.support.plans import write_plan
from tests.support.untried import build_untried

__all__ = ["rolled", "watcher"]  # the fixtures
UNWATCHED = {"early_exit.sampling_rate is 0": ServingConfig(sampling_rate=0),
             "early_exit.exits is false": ServingConfig(exits=False)}


def on_trial(**changed: object) -> ModelStatus:
    """Return a version that `ee-watch` has just rolled in, before any sample came."""
    return replace(seen(3000, version="3.0"), **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("why", UNWATCHED)
def test_a_version_that_no_monitor_watches_is_not_renewed(why: str, watcher: WatcherOfSights) -> None:
    watcher.sight = replace(seen(3000), config=UNWATCHED[why])
    watcher.tick()
    assert watcher.training.asked == [] and [event for event, _ in decisions(watcher)] == ["trouble"]
    error = watcher._watched.audit.read()[0]["error"]
    assert why in error and "its trial would never end" in error and "--config FILE" in error
    assert why in (watcher.obstacle(watcher.sight) or "")


@pytest.mark.parametrize("config", [ServingConfig(), *UNWATCHED.values()])
def test_the_status_names_what_is_in_the_way_of_a_renewal(
        config: ServingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(Watcher, "look", lambda self: replace(seen(3000), config=config)):
        assert main(["status", "digits", "--state", str(tmp_path)]) == 0
    assert ("obstacle" in capsys.readouterr().out) == (config != ServingConfig())


@pytest.mark.parametrize(("why", "changed"), [
    *((why, {"config": config}) for why, config in UNWATCHED.items()),
    ("its plan is certified for other traffic than it gets",
     {"traffic": "now", "plan": replace(SERVED, traffic="before")})])
def test_a_trial_ends_if_no_monitor_watches_the_version(
        why: str, changed: dict[str, object], watcher: WatcherOfSights) -> None:
    watcher.tick()
    watcher.sight = on_trial(**changed)
    watcher.tick()
    assert [event for event, _ in decisions(watcher)][-2:] == ["taking back", "rolled back"]
    reason = decisions(watcher)[-2][1]
    assert reason.startswith("no monitor watches it, so its trial would never end: ") and why in reason


def test_a_trial_goes_on_before_the_first_sample_and_if_any_worker_has_a_monitor(watcher: WatcherOfSights) -> None:
    watcher.tick()
    for sight in (on_trial(), on_trial(monitors=(MonitorState(),), traffic="now")):
        watcher.sight = sight
        watcher.tick()
        assert [event for event, _ in decisions(watcher)][-1] == "rolled"


@pytest.mark.parametrize(("sampling_rate", "is_certified"), [(0, True), (0, False), (0.01, True)])
def test_ee_archive_warns_of_a_certificate_that_nothing_watches(
        sampling_rate: float, is_certified: bool, recorder_mar: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"early_exit: {{sampling_rate: {sampling_rate}}}")
    plan = write_plan(tmp_path / "plan", recorder_mar, certificate=CERTIFICATE if is_certified else None)
    lines: list[str] = []
    build_untried(ArchiveRequest(str(recorder_mar), tmp_path, version="3.0", plan=plan,
                                 config=tmp_path / "config.yaml"), lines.append)
    is_warned = any("nothing watches the plan's certificate" in line for line in lines)
    assert is_warned == (is_certified and sampling_rate == 0)


def test_a_limit_that_keeps_fewer_records_than_a_renewal_needs_is_reported_once(
        watcher: WatcherOfSights, tmp_path: Path) -> None:
    lines: list[str] = []
    watcher._log = lines.append
    watcher.training = Training()
    shard = tmp_path / "a.safetensors"
    for n_records in (100, 101):
        shard.write_bytes(b"0" * 1000 * n_records)
        watcher.sight = replace(seen(n_records, plan=None), shards=(shard,),
                                config=ServingConfig(records_max_bytes=500_000))
        watcher.tick()
    assert lines == ["the next renewal needs 994 new records, but early_exit.records_max_bytes, which is 500000, keeps "
                     "only about 500 of their size, so it never begins: set at least 994000 in model-config.yaml, "
                     "record less of each request (early_exit.layers, pool), or pass a larger --tolerance"]
    enough = replace(watcher.sight, config=ServingConfig(records_max_bytes=1_000_000))
    assert watcher.obstacle(enough) is None
    assert watcher.obstacle(replace(enough, times=torch.zeros(0), shards=())) is None, "nothing is known yet"


def test_an_age_limit_that_keeps_fewer_records_than_a_renewal_needs_is_reported_when_the_rate_is_known(
        watcher: WatcherOfSights) -> None:
    lines: list[str] = []
    watcher._log = lines.append
    watcher.sight = replace(seen(100, plan=None), config=ServingConfig(records_max_age_s=991.0))
    watcher.tick()
    assert not lines, "99 s do not tell how many come in 991 s"
    watcher.sight = replace(seen(101, plan=None), config=ServingConfig(records_max_age_s=990.0))
    watcher.tick()
    [line] = lines
    assert "needs 994 new records" in line and "early_exit.records_max_age_s, which is 990," in line
    watcher.sight = replace(watcher.sight, config=ServingConfig(records_max_age_s=994.0))
    assert watcher.obstacle(watcher.sight) is None


def test_another_obstacle_is_reported_although_one_was(watcher: WatcherOfSights) -> None:
    lines: list[str] = []
    watcher._log = lines.append
    for config in (*UNWATCHED.values(), ServingConfig(records_max_age_s=100.0)) * 2:
        watcher.sight = replace(seen(100, plan=None), config=config)
        watcher.tick()
    assert [any(what in line for line in lines) for what in (*UNWATCHED, "records_max_age_s")] == [True] * 3
    assert len(lines) == 3, "each once"


def test_a_folder_that_is_named_twice_has_no_room_for_twice_as_many_records(
        watcher: WatcherOfSights, tmp_path: Path) -> None:
    shard = tmp_path / "a.safetensors"
    shard.write_bytes(b"0" * 100_000)
    (tmp_path / "link").symlink_to(tmp_path)
    watcher._watched = replace(watcher._watched, sources=[str(tmp_path), f"{tmp_path}/.", str(tmp_path / "link")])
    sight = replace(seen(100, plan=None), shards=(shard,), config=ServingConfig(records_max_bytes=500_000))
    assert "keeps only about 500 of" in (watcher.obstacle(sight) or "")
