"""The command `ee-exits`: what it prints, what it writes into the audit, and which models it refuses."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from early_exit.archiver.audit import audit_of
from early_exit.archiver.gateway.cli import _decisions
from early_exit.archiver.gateway.cli import parser as gateway_parser
from early_exit.archiver.switch.cli import main
from early_exit.handler.exits.switch import SWITCHES_VARIABLE, ExitSwitch, Position


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a server's switches, in which a worker of cifar has looked for its own switch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(SWITCHES_VARIABLE, raising=False)
    folder = tmp_path / ".ee-serve" / "exits"
    (folder / "cifar").mkdir(parents=True)
    return folder


def test_it_sets_the_switch_tells_so_and_notes_who_did_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    user = pwd.getpwuid(os.getuid()).pw_name
    for arguments, position in ((["off"], Position(None)), (["level", "2"], Position(2)), (["on"], Position(0))):
        assert main(["cifar", *arguments]) == 0
        assert ExitSwitch(folder, "cifar").read() == position
        assert capsys.readouterr().out == f"cifar  exits {' '.join(arguments)}, from the next batch on\n"
        assert main(["cifar", "status"]) == 0
        assert f"cifar  exits {position}, set at 2" in (told := capsys.readouterr().out) and f"by {user}" in told
    events = audit_of(folder, "cifar").read()
    assert [event["event"] for event in events] == ["exits off", "exits level 2", "exits on"]
    assert {(event["command"], event["by"]) for event in events} == {("ee-exits", user)}


def test_status_does_not_take_what_others_have_written_for_what_the_audit_says(
        folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cifar", "status"]) == 0
    assert capsys.readouterr().out == "cifar  exits on\n"
    assert main(["cifar", "on"]) == 0
    (folder / "cifar" / "switch").write_text("off\n")
    assert main(["cifar", "status"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "cifar  exits off, set by other means than ee-exits"


def test_machines_get_a_line_of_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cifar", "level", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["event"] == "exits on"
    assert main(["cifar", "off", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["event"] == "exits off"
    assert main(["cifar", "status", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["exits"], told["unreadable"], told["file"]) == ("off", None, ".ee-serve/exits/cifar/switch")


def test_status_tells_why_a_switch_that_cannot_be_read_is_off(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cifar" / "switch").write_text("perhaps")
    assert main(["cifar", "status"]) == 0
    assert "exits off, as the switch cannot be read: expected 'on', 'off' or 'level N', found 'perhaps'" in (
        capsys.readouterr().out)
    assert main(["cifar", "on"]) == 0
    assert ExitSwitch(folder, "cifar").read() == Position(0), "and the command mends it"


@pytest.mark.parametrize("name", ["cifarr", "../cifar", "cifar/../cifar", ""])
def test_a_name_that_no_worker_reads_is_refused(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "off"]) == 1
    told = capsys.readouterr().err
    assert "Found cifar there" in told or "expected a bare name" in told
    assert [path.name for path in folder.rglob("*")] == ["cifar"], "and nothing is written"


def test_where_there_is_no_server_it_says_what_to_pass(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["cifar", "off"]) == 1
    assert "Found no models there" in (told := capsys.readouterr().err) and "--switches" in told
    assert not list(tmp_path.iterdir())


def test_the_variable_of_a_server_names_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCHES_VARIABLE, str(folder.parent / "others"))
    (folder.parent / "others" / "cifar").mkdir(parents=True)
    assert main(["cifar", "off"]) == 0
    assert ExitSwitch(folder.parent / "others", "cifar").read() == Position(None)
    assert ExitSwitch(folder, "cifar").read() == Position(0)


def test_an_audit_that_cannot_be_written_holds_nothing_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cifar" / "audit.jsonl").mkdir()
    assert main(["cifar", "off"]) == 1
    assert ExitSwitch(folder, "cifar").read() == Position(None)
    told = capsys.readouterr().err
    assert "the exits of cifar are off from the next batch on, but this setting could not be saved" in told


def test_switching_loads_neither_torch_nor_an_archive(folder: Path) -> None:
    """Loading torch would take seconds that matter in an incident, and loading an archive could run its code."""
    script = "import sys; from early_exit.archiver.switch.cli import main; main(['cifar', 'off']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder.parents[1], capture_output=True, text=True,
                          check=True)
    loaded = set(done.stdout.split())
    assert "early_exit.handler.exits.switch" in loaded
    assert not loaded & {"torch", "numpy", "httpx", "yaml", "ts", "early_exit.handler.archive_layout"}


def test_the_live_page_shows_it_among_the_watchers_decisions(folder: Path) -> None:
    audit_of(Path(".ee-watch"), "cifar").append("rolled", version="3.0")
    assert main(["cifar", "off"]) == 0
    audit_of(Path(".ee-watch"), "cifar").append("attempt", reason="age")
    options = gateway_parser().parse_args([])
    assert [event["event"] for event in _decisions(options, "cifar")] == ["rolled", "exits off", "attempt"]
