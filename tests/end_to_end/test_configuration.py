"""`ee-serve --config`: what a real TorchServe does with a user's settings."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from early_exit.archiver.torchserve.addresses import free_ports
from early_exit.archiver.torchserve.tokens import read_token
from tests.support.client import consecutive_free_ports
from tests.support.digits import traffic

pytestmark = pytest.mark.slow

CONFIG = """inference_address=http://0.0.0.0:1
max_request_size=20000
cors_allowed_origin=https://page.example
metrics_config=mine.yaml
grpc_inference_port={0}
grpc_management_port={1}
"""
METRICS = """ts_metrics:
  counter:
    - {name: Requests2XX, unit: Count, dimensions: [Level, Hostname]}
model_metrics:
  gauge:
    - {name: HandlerTime, unit: ms, dimensions: [ModelName, Level]}
"""


def test_a_server_takes_the_users_settings_and_metrics_and_keeps_what_is_ours(
        recorder_mar: Path, tmp_path: Path) -> None:
    body, port, grpc = traffic(1, seed=70)[0].body, consecutive_free_ports(), free_ports(2)
    (tmp_path / "mine.properties").write_text(CONFIG.format(*grpc))
    (tmp_path / "mine.yaml").write_text(METRICS)
    command = [Path(sys.executable).parent / "ee-serve", recorder_mar.name, "--model-store", recorder_mar.parent,
               "--config", "mine.properties", "--port", str(port), "--json"]
    with (tmp_path / "said").open("w") as said, subprocess.Popen(
            command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=said,
            env={**os.environ, "TS_CONFIG_FILE": "/etc/theirs.properties"}) as serving:
        try:
            assert serving.stdout is not None
            places = json.loads(serving.stdout.readline())
            lines = (tmp_path / "said").read_text()
            assert "TS_CONFIG_FILE=/etc/theirs.properties does not count, --config decides" in lines
            assert f"inference_address=http://0.0.0.0:1 does not count, --host and --port decide: " \
                   f"http://127.0.0.1:{port}" in lines
            assert [places["grpc_inference"], places["grpc_management"]] == [f"127.0.0.1:{one}" for one in grpc]
            for one in grpc:
                socket.create_connection(("127.0.0.1", one), timeout=10).close()
            key = {"Authorization": f"Bearer {read_token(Path(places['tokens']), 'inference')}"}
            url = f"{places['inference']}/predictions/digits"
            deadline = time.monotonic() + 60
            while not (answered := requests.post(url, data=body, headers=key, timeout=30)).ok:
                assert time.monotonic() < deadline, answered.text
                time.sleep(0.5)
            assert answered.headers["Access-Control-Allow-Origin"] == "https://page.example"
            assert answered.headers["X-Early-Exit"] == "full"
            assert requests.post(url, data=bytes(20_001), headers=key, timeout=30).status_code == 413
            deadline = time.monotonic() + 20
            for name in ("Requests2XX{", "HandlerTime{", 'ee_answers_total{ModelName="digits"',
                         'ts_inference_requests_total{model_name="digits"'):
                while name not in (told := requests.get(places["metrics"], timeout=10).text):
                    assert time.monotonic() < deadline, (name, told)
                    time.sleep(0.5)
            assert "Requests4XX" not in told, "the user's file does not name it"
        finally:
            serving.send_signal(signal.SIGINT)
            assert serving.wait(60) == 0
