"""What the commands do when they are used wrongly, or are only asked for help."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from early_exit.archiver.gateway.cli import main as gateway
from early_exit.archiver.packaging.cli import main as archive
from early_exit.archiver.rollout.cli import main as roll
from early_exit.archiver.switch.cli import main as exits
from early_exit.archiver.torchserve.cli import main as serve
from early_exit.archiver.watch.cli import main as watch
from early_exit.training.cli import main as train
from tests.support.client import consecutive_free_ports

pytestmark = pytest.mark.slow

COMMANDS = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run each test in an empty folder, and restore the signal handlers that commands set for their process."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_missing_server_is_a_message_and_status_1(recorder_mar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert roll([str(recorder_mar), "--port", str(consecutive_free_ports()), "--no-tokens"]) == 1
    assert "Is TorchServe running there?" in capsys.readouterr().err


def test_a_single_look_that_fails_is_status_1_and_a_line_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model-store").mkdir()
    assert watch(["cifar", "--once", "--json", "--port", str(consecutive_free_ports()), "--no-tokens"]) == 1
    looked = capsys.readouterr()
    [decision] = [json.loads(line) for line in looked.out.splitlines()]
    assert decision["event"] == "trouble" and "Is TorchServe running there?" in decision["error"]
    assert "trouble: error" in looked.err, "for people"


@pytest.mark.parametrize("token", [None, "", " "])
def test_the_gateway_does_not_listen_for_other_machines_without_a_token(
        token: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if token is None:
        monkeypatch.delenv("EE_GATEWAY_TOKEN", raising=False)
    else:
        monkeypatch.setenv("EE_GATEWAY_TOKEN", token)
    assert gateway(["--host", "0.0.0.0"]) == 1
    assert "set EE_GATEWAY_TOKEN to a secret" in capsys.readouterr().err


def test_the_gateway_makes_a_token_where_none_is_set_and_tells_it_in_a_line_for_machines(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EE_GATEWAY_TOKEN", "")
    port = consecutive_free_ports()
    with subprocess.Popen([COMMANDS / "ee-gateway", "--json", "--port", str(port)], cwd=tmp_path, text=True,
                          stdout=subprocess.PIPE) as gateway:
        assert gateway.stdout is not None
        told = json.loads(gateway.stdout.readline())
        assert told == {"page": f"http://127.0.0.1:{port}/#token={told['token']}",
                        "websocket": f"ws://127.0.0.1:{port}/ws/MODEL", "token": told["token"]}
        assert len(told["token"]) == 48, "its own, of this start"
        assert "Early exits" in requests.get(told["page"], timeout=30).text
        state = f"http://127.0.0.1:{port}/state"
        assert requests.get(state, timeout=30).status_code == 401
        allowed = {"Authorization": f"Bearer {told['token']}"}
        assert requests.get(state, headers=allowed, timeout=30).status_code == 200
        gateway.send_signal(signal.SIGINT)
        assert gateway.wait(30) == 0


def test_a_second_signal_does_not_disturb_what_the_first_one_has_begun(tmp_path: Path) -> None:
    program = """if True:
        import time
        from early_exit.training.command import raise_on_terminate, run_command

        def work():
            try:
                print("working", flush=True)
                time.sleep(60)
            finally:
                print("stopping", flush=True)
                time.sleep(1)
                print("stopped", flush=True)

        raise_on_terminate()
        raise SystemExit(run_command("program", work))"""
    with subprocess.Popen([sys.executable, "-c", program], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "working\n"
        running.send_signal(signal.SIGTERM)
        assert running.stdout.readline() == "stopping\n"
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            running.send_signal(number)
        told, complaint = running.communicate(timeout=30)
        assert (told, complaint, running.returncode) == ("stopped\n", "program: interrupted\n", 1)


@pytest.mark.parametrize("main, command", [
    (archive, "ee-archive"), (train, "ee-train"), (serve, "ee-serve"), (roll, "ee-roll"), (watch, "ee-watch"),
    (gateway, "ee-gateway"), (exits, "ee-exits")])
def test_help_ends_with_examples_and_shells_get_completions(
        capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert command in told.partition("usage:")[2] and command in told.partition("examples:")[2]
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    completions = capsys.readouterr().out
    assert ended.value.code == 0 and f"-F _shtab_{command.replace('-', '_')} {command}" in completions
    assert subprocess.run(["bash", "-n"], input=completions, text=True, check=False).returncode == 0


@pytest.mark.parametrize(("main", "arguments"), [(train, ["records"]), (archive, []), (roll, []),
                                                   (exits, ["cifar", "level"]), (exits, ["cifar", "off", "1"])])
def test_misuse_is_status_2(main: Callable[[list[str]], int], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
