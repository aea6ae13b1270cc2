"""What a roll keeps: the old version's settings, the model's name on the server, and the way back to the original."""

from __future__ import annotations

import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from early_exit.archiver.control import RunSettings
from early_exit.archiver.packaging.registered import registered_archive
from early_exit.archiver.rollout import cli
from early_exit.archiver.rollout.fleet import roll_all
from early_exit.archiver.rollout.roll import RollReport, roll
from early_exit.handler.archive_layout import HANDLER, MANIFEST
from early_exit.handler.errors import ArchiveError, ServerError
from tests.support.rewritten import rewritten
from tests.support.server_in_memory import ServerInMemory
from tests.support.slow_server import plain_mar
from tests.support.virtual_clock import VirtualClock

WAS = RunSettings(batch_size=3, max_batch_delay_ms=37, response_timeout_s=77, workers=(1, 1))


def serving(store: Path, settings: RunSettings = WAS, *, model: str = "digits", **more: Any) -> ServerInMemory:
    """Return a server that runs digits 1.0 with settings that were given by hand; its archive contains none."""
    server = ServerInMemory("server", store, **more)
    server.register(plain_mar(store, "1.0").name, settings, model=model)
    return server


def rolled(server: ServerInMemory, mar: Path, said: list[str] | None = None, **more: Any) -> RollReport:
    return roll(server, mar, untried=True, longest_batch_s=0.0, clock=VirtualClock(),
                log=(said if said is not None else []).append, **more)


def test_what_the_new_configuration_leaves_open_is_as_it_was(tmp_path: Path) -> None:
    server, said = serving(tmp_path), list[str]()
    server.scale("digits", "1.0", (2, 3))
    report = rolled(server, plain_mar(tmp_path, "2.0"), said)
    assert server.registered["2.0"].settings == report.kept == RunSettings(3, 37, 77, (2, 3))
    assert "kept from 1.0: batch size 3, batch delay 37 ms, response timeout 77 s, workers 2 to 3" in said


def test_what_the_new_configuration_says_holds_and_is_told(tmp_path: Path) -> None:
    server, said = serving(tmp_path), list[str]()
    report = rolled(server, plain_mar(tmp_path, "2.0", config="batchSize: 8\nresponseTimeout: 90\nminWorkers: 2\n"
                                                              "maxWorkers: 2\n"), said)
    assert server.registered["2.0"].settings == RunSettings(8, 37, 90, (2, 2))
    assert report.changed == RunSettings(8, None, 90, (2, 2)) and report.kept == RunSettings(max_batch_delay_ms=37)
    assert ("set by its own model-config.yaml: batch size 8 instead of 3, response timeout 90 s instead of 77 s, "
            "workers 2 to 2 instead of 1 to 1") in said


def test_workers_that_a_version_was_given_while_it_served_are_kept_unless_the_configuration_has_changed(
        tmp_path: Path) -> None:
    server = serving(tmp_path)
    two = "minWorkers: {0}\nmaxWorkers: {0}\nresponseTimeout: 77\n".format
    rolled(server, plain_mar(tmp_path, "2.0", config=two(2)))
    server.scale("digits", "2.0", (5, 5))
    rolled(server, plain_mar(tmp_path, "3.0", config=two(2)))
    assert server.registered["3.0"].settings.workers == (5, 5)
    rolled(server, plain_mar(tmp_path, "4.0", config=two(3)))
    assert server.registered["4.0"].settings.workers == (3, 3)


def test_a_setting_that_the_server_does_not_keep_stops_the_roll(tmp_path: Path) -> None:
    """TorchServe 0.12 sets a response timeout of 120 s for every archive whose configuration names no timeout."""
    server = serving(tmp_path)
    with pytest.raises(ServerError, match="gives 2.0 response timeout 120 s instead of 77 s, which 1.0 has: set it in "
                                          "the new archive's model-config.yaml"):
        rolled(server, plain_mar(tmp_path, "2.0", config="batchSize: 8\n"))
    assert (server.default, list(server.registered)) == ("1.0", ["1.0"])


@pytest.mark.parametrize(("says", "takes"), [
    ("batchSize: 4", RunSettings(batch_size=4)), ("batchSize: 0", RunSettings()), ("batchSize: '4'", RunSettings()),
    ("batchSize: true", RunSettings()), ("minWorkers: 2", RunSettings()),
    ("minWorkers: 2\nmaxWorkers: 1", RunSettings()), ("minWorkers: 1\nmaxWorkers: 3", RunSettings(workers=(1, 3))),
    ("- a list", RunSettings()), ("", RunSettings())])
def test_of_a_configuration_counts_what_the_server_takes(tmp_path: Path, says: str, takes: RunSettings) -> None:
    assert registered_archive(plain_mar(tmp_path, "1.0", config=says)).configured == takes


@pytest.mark.parametrize("archive_format", ["no-archive", "tgz"])
def test_an_original_that_is_no_zip_is_read_as_well(tmp_path: Path, archive_format: str) -> None:
    zipped = plain_mar(tmp_path, "1.5", config="batchSize: 4\n")
    folder = tmp_path / "digits"
    shutil.unpack_archive(zipped, folder, "zip")
    source = folder
    if archive_format == "tgz":
        source = tmp_path / "digits.tar.gz"
        with tarfile.open(source, "w:gz") as archive:
            archive.add(folder, "digits")
    assert registered_archive(source) == registered_archive(zipped)


def test_a_model_that_is_registered_under_another_name_is_replaced_under_that(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serving(tmp_path, model="photos")
    assert command(server, plain_mar(tmp_path, "2.0"), monkeypatch, "--as", "photos") == 0
    assert {model: list(versions) for model, versions in server.all.items()} == {"photos": ["2.0"]}


def test_an_archive_that_was_made_from_another_and_replaces_nothing_is_a_warning_and_status_1(
        tmp_path: Path, recorder_mar: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    server = serving(tmp_path, model="photos")
    (tmp_path / recorder_mar.name).write_bytes(recorder_mar.read_bytes())
    assert command(server, tmp_path / recorder_mar.name, monkeypatch) == 1
    printed = capsys.readouterr()
    assert "digits 2.0 serves" in printed.out
    assert ("warning: no version of digits was registered on server, so digits-2.0.mar replaces nothing there, though "
            "it was made from digits 1.0. If it should replace photos, remove it and pass --as NAME") in printed.err


def test_an_archive_that_was_made_from_no_other_may_be_the_first(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(ServerInMemory("server", tmp_path), plain_mar(tmp_path, "1.0"), monkeypatch) == 0
    assert "warning" not in capsys.readouterr().err


def command(server: ServerInMemory, mar: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """Run `ee-roll` for a server; return its status."""
    monkeypatch.setattr(cli, "servers_of", lambda options: [server])
    monkeypatch.setattr(cli, "raise_on_terminate", lambda: None)
    clock = VirtualClock()
    monkeypatch.setattr(cli, "roll_all", lambda *servers, **limits: roll_all(*servers, clock=clock, **limits))
    return cli.main([str(mar), "--untried", "--longest-batch-s", "0", *options])


def test_an_adoption_that_fails_is_put_back_to_the_original_archive_named_and_run_as_it_was(tmp_path: Path) -> None:
    done, failing = serving(tmp_path, model="photos"), serving(tmp_path, model="photos")
    done.scale("photos", "1.0", (2, 4))
    failing.register = refuse  # type: ignore[method-assign, assignment]
    with pytest.raises(ServerError, match="no room\n.*\nserver was put back to 1.0"):
        roll_all([done, failing], plain_mar(tmp_path, "2.0", config="batchSize: 8\nresponseTimeout: 77\n"),
                 name="photos", put_back=True, untried=True, longest_batch_s=0.0, clock=VirtualClock())
    assert [(status.version, status.settings) for status in done.versions("photos")] == [
        ("1.0", RunSettings(3, 37, 77, (2, 4)))]


def test_an_archive_that_the_server_fetched_and_deletes_with_its_version_is_kept_for_the_way_back(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for can_link in (True, False):
        if not can_link:
            monkeypatch.setattr("os.link", refuse_link)
        server = serving(tmp_path)
        server.all["digits"]["1.0"] = replace(server.registered["1.0"], is_downloaded=True)
        before = (tmp_path / "digits-1.0.mar").read_bytes()
        rolled(server, plain_mar(tmp_path, "2.0"))
        assert (tmp_path / "digits-1.0.mar").read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-1.0.mar", "digits-2.0.mar"]


def refuse_link(*paths: Path) -> None:
    raise PermissionError


def test_a_failed_roll_of_several_servers_puts_nothing_back_over_what_somebody_else_brought_in(tmp_path: Path) -> None:
    done, failing = serving(tmp_path), serving(tmp_path)
    plain_mar(tmp_path, "3.0")

    def meanwhile(*arguments: Any, **more: Any) -> None:
        rolled(done, tmp_path / "digits-3.0.mar")
        raise ServerError("no room")

    failing.register = meanwhile  # type: ignore[method-assign]
    with pytest.raises(ServerError, match="no room\n.*\nserver now serves 3.0"):
        roll_all([done, failing], plain_mar(tmp_path, "2.0"), put_back=True, untried=True, longest_batch_s=0.0,
                 clock=VirtualClock())
    assert list(done.registered) == ["3.0"]


def refuse(file_name: str, settings: RunSettings, **more: Any) -> None:
    raise ServerError("no room")


def test_an_original_is_tried_out_with_a_sample_of_the_archive_that_was_made_from_it(
        tmp_path: Path, recorder_mar: Path) -> None:
    served = rewritten(recorder_mar, tmp_path / "digits-2.0.mar", **{"early_exit/sample-request": b"an image"})
    assert (ours := registered_archive(served).ours) is not None and ours.samples
    server = ServerInMemory("server", tmp_path)
    server.register(served.name, RunSettings())
    server.calls.clear()
    roll(server, plain_mar(tmp_path, "1.0"), longest_batch_s=0.0, clock=VirtualClock())
    assert server.calls == [("register", "1.0"), *[("predict", "1.0", "")] * 2, ("set_default", "1.0"),
                            ("unregister", "2.0")], "it has no probe"


def test_an_original_of_which_no_request_is_known_serves_only_if_it_is_told_to(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"digits-2\.0\.mar has no sample request.*--untried"):
        roll(serving(tmp_path), plain_mar(tmp_path, "2.0"), longest_batch_s=0.0, clock=VirtualClock())


def test_an_archive_of_ours_that_is_damaged_is_not_taken_for_an_original(tmp_path: Path) -> None:
    ours = rewritten(plain_mar(tmp_path, "1.0"), tmp_path / "ours.mar",
                     **{MANIFEST: lambda text: text.replace("handler.py", HANDLER)})
    with pytest.raises(ArchiveError, match="is not an early-exit archive: it has no early_exit/"):
        registered_archive(ours)
