"""The live page in a real browser, in front of a real TorchServe: traffic, a promise, a roll, an alarm, trouble."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from websockets.sync.client import connect

from early_exit.archiver.audit import Audit
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout.roll import roll
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.tokens import read_token
from early_exit.handler.exits.plan import Certificate
from early_exit.handler.exits.risk import Risk
from tests.conftest import WORKERS
from tests.support.browser import CHROMIUM, Browser, browser
from tests.support.client import failed, send
from tests.support.digits import traffic
from tests.support.documents import ROOT
from tests.support.gateway import as_bytes, gateway, receive, wait_for_state
from tests.support.plans import write_plan
from tests.support.untried import build_untried

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")]

BODIES = [one.body for one in traffic(120, seed=15)]
CONFIG = WORKERS.format(n=1) + "  sampling_rate: 0.5\n"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pictures() -> Path:
    """Where screenshots are kept: $SCREENSHOTS, else build/screenshots, which git ignores."""
    return Path(os.environ.get("SCREENSHOTS") or ROOT / "build" / "screenshots")


@pytest.fixture(scope="module")
def server(recorder_mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """Serves digits 3.0, which promises next to nothing; 4.0 promises more than its untrained heads can keep."""
    folder = tmp_path_factory.mktemp("live")
    (folder / "config.yaml").write_text(CONFIG)
    for version, tolerance in (("3.0", 0.97), ("4.0", 0.02)):
        certificate = Certificate(Risk.DISAGREEMENT, tolerance, 0.95, 1000, 5, 0.005, 0.01, "by hand", (0.0, 1.0))
        plan = write_plan(folder / version, recorder_mar, threshold=0.4, certificate=certificate)
        build_untried(ArchiveRequest(str(recorder_mar), folder / "store", plan=plan, version=version,
                                     config=folder / "config.yaml"))
    with TorchServe(folder / "store", folder / "state", Addresses.free(), records=folder / "records",
                    models=["digits-3.0.mar"]) as running:
        yield running


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    return Audit(tmp_path_factory.mktemp("watch") / "audit.jsonl")


@pytest.fixture(scope="module")
def address(server: TorchServe, audit: Audit) -> Iterator[str]:
    with gateway(server.addresses, server.key_file, store=server.model_store,
                 decisions=lambda model: audit.read()) as at:
        yield at


def work_told(tab: Browser) -> int:
    """Return the percentage of the full model's work that the page tells."""
    found = re.search(r"so it did (\d+) % of the work", tab.text())
    assert found is not None, tab.text()
    return int(found.group(1))


def test_before_any_traffic_the_page_says_so(tab: Browser, address: str, pictures: Path) -> None:
    wait_for_state(address, lambda state: state["looks"] if state["model"] else None)
    tab.open(f"http://{address}/")
    tab.wait_for("No requests in the last ten minutes", "With 95% confidence", "has not seen a shadow sample")
    tab.picture(pictures / "empty.png")


def test_the_page_shows_where_requests_leave_and_whether_the_promise_holds(
        tab: Browser, server: TorchServe, address: str, pictures: Path, tmp_path: Path) -> None:
    bodies = BODIES * 3
    assert failed(send(server, "digits", bodies)) == 0
    state = wait_for_state(address, lambda state: sum(
        sum(exits.values()) for look in state["looks"] for exits in look["answers"].values()) == len(bodies))
    taken = {name: sum(look["answers"].get("3.0", {}).get(name, 0) for look in state["looks"])
             for name in (*(exit_["layer"] for exit_ in state["versions"][0]["plan"]["exits"]), "full")}
    assert sum(taken.values()) == len(bodies), "each request is counted once"
    early = 1 - taken["full"] / len(bodies)
    tab.open(f"http://{address}/")
    seen = tab.wait_for(f"of the last {len(bodies)} requests left the model early", "watched answers differ",
                        "took on average", "with version 3.0")
    assert f"{100 * early:.0f} %" in seen
    (tmp_path / "digit.png").write_bytes(BODIES[0])
    tab.choose_file("#file", tmp_path / "digit.png")
    tab.wait_for("answered", "opinions together took")
    for name, width, dark in (("light", 1200, False), ("dark", 1200, True), ("narrow", 360, False)):
        tab.open(f"http://{address}/", width=width, dark=dark)
        tab.wait_for("requests left the model early")
        tab.choose_file("#file", tmp_path / "digit.png")
        tab.wait_for("answered", "opinions together took")
        assert tab.run("document.documentElement.scrollWidth") <= width, "nothing reaches over the edge"
        tab.picture(pictures / f"{name}.png")
    assert not tab.complaints


def test_times_by_exit_are_of_answers_that_did_not_run_on_for_opinions_and_those_save_nothing(
        tab: Browser, address: str) -> None:
    assert not requests.get(f"http://{address}/state", timeout=30).json()["latency"], "all that were dropped ran on"
    tab.open(f"http://{address}/")
    tab.wait_for("No answer has come over this gateway's WebSocket yet")
    with connect(f"ws://{address}/ws/digits") as socket:
        socket.send(as_bytes({str(number): body for number, body in enumerate(BODIES[:60])}))
        told = receive(socket, 60)
        tab.wait_for("half in", *{f"v 3.0 {'in full' if one['exit'] == 'full' else 'left early'}"
                                  for one in told.values()})
        work = work_told(tab)
        for again in range(4):
            socket.send(as_bytes({f"{again} {number}": body for number, body in enumerate(BODIES[:60])}, anytime=True))
        receive(socket, 240)
    deadline = time.monotonic() + 30
    while work_told(tab) <= work:
        assert time.monotonic() < deadline, "who hears every exit has run to the end"
        time.sleep(0.2)


LATE = """const real = fetch; let first = true; window.fetch = async (path, options) => {
    const late = first && String(path).startsWith(%s);
    if (late) first = false;
    const reply = await real(path, options);
    if (late) await new Promise((done) => setTimeout(done, 3000));
    return reply;
}"""
"""Holds up the page's first request of a kind."""


def test_a_file_that_is_dropped_is_asked_and_an_answer_that_comes_too_late_is_not_shown(
        tab: Browser, address: str, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"no image")
    (tmp_path / "digit.png").write_bytes(BODIES[0])
    tab.open(f"http://{address}/")
    tab.wait_for("requests left the model early")
    tab.drop_files("#drop", tmp_path / "bad.txt")
    tab.wait_for("UnidentifiedImageError")
    tab.run(LATE % "'ask/'")
    tab.drop_files("#drop", tmp_path / "bad.txt")
    tab.drop_files("#drop", tmp_path / "digit.png")
    tab.wait_for("answered", "opinions together took")
    assert not tab.run("document.querySelector('#preview').hidden")
    time.sleep(4)
    assert "UnidentifiedImageError" not in tab.wait_for("opinions together took")
    assert all("status of 400" in one for one in tab.complaints)
    tab.complaints.clear()


def test_another_model_is_shown_when_it_is_chosen_though_a_look_at_the_first_is_on_its_way(
        tab: Browser, server: TorchServe, address: str, tmp_path: Path) -> None:
    token = {"Authorization": f"Bearer {read_token(server.key_file, 'management')}"}
    registered = requests.post(f"{server.addresses.management}/models", headers=token, timeout=120, params={
        "url": "digits-3.0.mar", "model_name": "other", "initial_workers": 1, "synchronous": "true"})
    assert registered.status_code == 200, registered.text
    wait_for_state(address, lambda state: state["models"] == ["digits", "other"])
    (tmp_path / "digit.png").write_bytes(BODIES[0])
    tab.open(f"http://{address}/")
    tab.wait_for("requests left the model early", "Model")
    tab.choose_file("#file", tmp_path / "digit.png")
    tab.wait_for("opinions together took")
    tab.run(LATE % "'state'")
    time.sleep(2.5)  # by then the page looks again
    tab.run("""(() => { const select = document.querySelector('#model');
        select.value = 'other'; select.dispatchEvent(new Event('change')); })()""")
    told = tab.wait_for("other 3.0", "Every exit then says")
    assert "opinions together took" not in told, "they were the other model's"
    for _ in range(20):
        assert tab.run("document.querySelector('#model').value") == "other"
        time.sleep(0.2)
    requests.delete(f"{server.addresses.management}/models/other", headers=token, timeout=60).raise_for_status()
    wait_for_state(address, lambda state: state["models"] == ["digits"])


def test_everything_can_be_reached_with_the_keyboard(tab: Browser, address: str) -> None:
    tab.open(f"http://{address}/")
    tab.wait_for("requests left the model early")
    tab.press("Tab", 9)
    assert tab.run("document.activeElement.id") == "file", "one model needs no choice; the first stop is the file"


def test_a_roll_an_alarm_and_a_decision_appear_on_the_time_line(
        tab: Browser, server: TorchServe, address: str, audit: Audit, pictures: Path, tmp_path: Path) -> None:
    roll(Management(server.addresses, server.key_file), server.model_store / "digits-4.0.mar", longest_batch_s=1)
    audit.append("rolled", version="4.0", replaces="3.0", why="it is cheaper")
    tab.open(f"http://{address}/")
    deadline = time.monotonic() + 60
    while "stepped back" not in tab.text():
        assert time.monotonic() < deadline, tab.text()
        assert failed(send(server, "digits", BODIES)) == 0
    tab.wait_for("version 4.0 serves instead of 3.0", "ee-watch: rolled 4.0 instead of 3.0 (it is cheaper)",
                 "alarm: version 4.0 has stepped back", "no longer holds", "version 3.0 is removed")
    (tmp_path / "digit.png").write_bytes(BODIES[0])
    tab.choose_file("#file", tmp_path / "digit.png")
    tab.wait_for("No exit was asked: the whole model answered")
    tab.picture(pictures / "alarm.png")
    assert not tab.complaints


def test_the_page_says_what_is_wrong_and_recovers(tab: Browser, server: TorchServe, tmp_path: Path,
                                                  pictures: Path) -> None:
    key_file = tmp_path / "keys.json"
    key_file.write_text(json.dumps({kind: {"key": "none"} for kind in ("inference", "management", "API")}))
    with gateway(Addresses.free(), key_file) as alone:
        tab.open(f"http://{alone}/")
        tab.wait_for("no answer from", "no news")
        tab.picture(pictures / "gone.png")
    tab.wait_for("The gateway does not answer")
    with gateway(server.addresses, server.key_file, token="secret") as closed:
        tab.open(f"http://{closed}/")
        tab.wait_for("wants its token")
        tab.picture(pictures / "token.png")
        for given, answer in (("wrong", "That was not it"), ("secret", "digits 4.0")):
            tab.run(f"document.querySelector('#token input').value = '{given}'")
            tab.run("document.querySelector('#token button').click()")
            tab.wait_for(answer)
        assert "wants its token" not in tab.text()
