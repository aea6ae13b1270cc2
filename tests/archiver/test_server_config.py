"""What `ee-serve --config` takes from a user's config.properties and metrics file, and what it says about the rest."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import javaproperties
import pytest
import yaml

from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.cli import _config
from early_exit.archiver.torchserve.metrics_file import complete_metrics_file
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.server_config import CONFIG_VARIABLE
from early_exit.handler.errors import ConfigError, ServerError

Configure = Callable[..., dict[str, str]]
ADDRESSES = Addresses.on_loopback(9080, 9081, 9082)


@pytest.fixture
def said() -> list[str]:
    """The lines that are logged for the user."""
    return []


@pytest.fixture
def configure(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Configure:
    """A function that returns TorchServe's settings and its command for the text of a user's configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("early_exit.archiver.torchserve.process.find_java", lambda: "java")

    def configure(text: str, **options: object) -> dict[str, str]:
        (tmp_path / "config.properties").write_text(text)
        server = TorchServe(tmp_path / "store", tmp_path / "state", ADDRESSES, config=Path("config.properties"),
                            log=said.append, **options)  # type: ignore[arg-type]
        return server._configured() | {"command": " ".join(server._command())}

    return configure


def test_what_is_the_users_goes_through_as_torchserve_reads_it(configure: Configure, said: list[str]) -> None:
    settings = configure(r"""
# a comment
max_request_size = 2000
cors_allowed_origin: *
service_envelope=json
install_py_dep_per_model=true
default_workers_per_model=3
token_expiration_min=7
grpc_inference_port=7170
grpc_inference_address=127.0.0.2
job_queue_size 50
models={\
  "cifar": {"2.0": {"batchSize": 4}}}
keystore_pass=\u00fcber\=all
""")
    assert settings.items() >= {
        "max_request_size": "2000", "cors_allowed_origin": "*", "service_envelope": "json",
        "install_py_dep_per_model": "true", "default_workers_per_model": "3", "token_expiration_min": "7",
        "grpc_inference_port": "7170", "grpc_inference_address": "127.0.0.2", "grpc_management_address": "127.0.0.1",
        "job_queue_size": "50", "models": '{"cifar": {"2.0": {"batchSize": 4}}}', "keystore_pass": "über=all"}.items()
    assert not said


def test_what_ee_serve_decides_counts_and_each_that_does_not_is_a_line(
        configure: Configure, said: list[str], tmp_path: Path) -> None:
    settings = configure("""
inference_address=https://0.0.0.0:8443
management_address=http://127.0.0.1:9081
model_store=/elsewhere
allowed_urls=.*
enable_model_api=true
disable_token_authorization=true
metrics_mode=log
model_snapshot={"name": "old"}
token_expiration_min=7
""", models=["cifar-2.0.mar"], token_minutes=5)
    store = tmp_path / "store"
    assert settings.items() >= {
        "inference_address": "http://127.0.0.1:9080", "management_address": "http://127.0.0.1:9081",
        "model_store": str(store), "allowed_urls": f"file://{re.escape(str(store))}/[^%]*", "enable_model_api": "true",
        "disable_token_authorization": "false", "metrics_mode": "prometheus", "model_metrics_auto_detect": "true",
        "load_models": "cifar-2.0.mar", "token_expiration_min": "5"}.items()
    assert "model_snapshot" not in settings
    told = [line.removeprefix("config.properties: ").partition(" ")[0] for line in said]
    assert sorted(told) == sorted([
        "inference_address=https://0.0.0.0:8443", "model_store=/elsewhere", "allowed_urls=.*",
        "disable_token_authorization=true", "metrics_mode=log", 'model_snapshot={"name":', "token_expiration_min=7"])
    assert said[0].endswith("=https://0.0.0.0:8443 is ignored, because of --host and --port: it is "
                            "http://127.0.0.1:9080")


def test_without_models_on_the_command_line_a_snapshot_and_the_users_models_are_loaded(configure: Configure) -> None:
    settings = configure('model_snapshot={"name": "old"}\nload_models=all\n')
    assert (settings["model_snapshot"], settings["load_models"]) == ('{"name": "old"}', "all")
    assert "-m" not in settings["command"].split()


def test_without_a_configuration_nothing_is_said_and_no_snapshots_are_kept(tmp_path: Path, said: list[str]) -> None:
    server = TorchServe(tmp_path, tmp_path / "state", ADDRESSES, models=["a.mar"], token_minutes=5, log=said.append)
    settings = server._configured()
    assert settings["token_expiration_min"] == "5" and settings["grpc_inference_address"] == "127.0.0.1"
    assert not said and "-ncs" in server._command()


def test_paths_are_meant_where_ee_serve_is_started_and_variables_in_them_count(
        configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("GRPC", "7270")
    settings = configure("keystore=$$KEYS$$/store.p12\nworkflow_store=flows\ngrpc_inference_port=$$GRPC$$\n"
                         "keystore_pass=$$PASS$$\n")
    assert settings["keystore"] == str(tmp_path / "keys" / "store.p12")
    assert settings["workflow_store"] == str(tmp_path / "flows")
    assert (settings["grpc_inference_port"], settings["keystore_pass"]) == ("7270", "$$PASS$$"), "TorchServe reads it"
    with pytest.raises(ConfigError, match="the variable NOBODYS of .* is not set"):
        configure("keystore=$$NOBODYS$$\n")


def test_variables_of_torchserve_count_where_the_configuration_says_so_but_not_for_what_ee_serve_decides(
        configure: Configure, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_MAX_REQUEST_SIZE", "3000")
    monkeypatch.setenv("TS_INFERENCE_ADDRESS", "http://0.0.0.0:1")
    assert configure("max_request_size=2000\n")["max_request_size"] == "2000"
    settings = configure("max_request_size=2000\nenable_envvars_config=true\n")
    assert settings["max_request_size"] == "3000" and settings["inference_address"] == ADDRESSES.inference
    assert "enable_envvars_config" not in settings, "or TorchServe would read them once more"
    assert [line for line in said if "inference_address=http://0.0.0.0:1 is ignored" in line]


def test_java_gets_the_users_arguments_and_plugins_and_keeps_ours(
        configure: Configure, said: list[str], tmp_path: Path) -> None:
    command = configure("vmargs=-Xmx4g -Dlog4j.configurationFile=mine.xml -Dmine=1\nplugins_path=plugins\n")["command"]
    assert "-Xmx4g -Dmine=1 -Dmodel_server_home=" in command and "mine.xml" not in command
    assert f"frontend/*:{tmp_path / 'plugins'}/* " in command
    assert "-ncs" not in command.split(), "snapshots are as with TorchServe itself"
    assert [line for line in said if "-Dlog4j.configurationFile=mine.xml of vmargs is ignored" in line]


def test_what_is_written_is_what_torchserve_reads(tmp_path: Path, configure: Configure) -> None:
    from early_exit.archiver.torchserve.server_config import as_properties

    settings = configure("keystore_pass= \\ a\\\\b\\tc\\u00e4#!=:\nmodels={\\\n\"a\": 1}\n")
    assert javaproperties.loads(as_properties(settings)) == settings


@pytest.mark.parametrize("content", [None, b"broken=\\u00zz"])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.properties").write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read TorchServe's configuration .*config\.properties"):
        TorchServe(tmp_path, tmp_path / "state", ADDRESSES, config=tmp_path / "config.properties")


def test_a_port_that_is_none_is_named_before_anything_is_started(tmp_path: Path) -> None:
    (tmp_path / "config.properties").write_text("grpc_inference_port=none\n")
    with pytest.raises(ServerError, match=r"expected a port as in 127.0.0.1:7070, found '127.0.0.1:none' in .*config"):
        TorchServe(tmp_path, tmp_path / "state", Addresses.free(), config=tmp_path / "config.properties").__enter__()


def test_the_variable_that_torchserve_would_take_its_configuration_from_is_not_dropped_silently(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, "/etc/theirs.properties")
    assert _config(argparse.Namespace(config=None)) == Path("/etc/theirs.properties")
    assert "TS_CONFIG_FILE names the configuration: /etc/theirs.properties" in capsys.readouterr().err
    assert _config(argparse.Namespace(config=Path("mine"))) == Path("mine")
    assert "TS_CONFIG_FILE=/etc/theirs.properties is ignored, because --config is mine" in capsys.readouterr().err
    monkeypatch.delenv(CONFIG_VARIABLE)
    assert _config(argparse.Namespace(config=None)) is None


def test_a_metrics_file_gets_what_the_live_page_reads_and_keeps_everything_else(
        tmp_path: Path, said: list[str]) -> None:
    users = tmp_path / "metrics.yaml"
    users.write_text("dimensions: [&level Level]\nts_metrics:\n  counter:\n"
                     "    - {name: Requests2XX, unit: Count, dimensions: [*level]}\n"
                     "    - {name: ts_inference_requests_total, unit: Count, dimensions: [model_name]}\n"
                     "  gauge:\n    - {name: QueueTime, unit: Milliseconds, dimensions: [*level]}\n")
    place = complete_metrics_file(users, tmp_path / "state" / "metrics.yaml", said.append)
    text = place.read_text()
    made = yaml.safe_load(text)
    counters = {counter["name"]: counter["dimensions"] for counter in made["ts_metrics"]["counter"]}
    labels = ["model_name", "model_version", "hostname"]
    assert counters == {"Requests2XX": ["Level"], "ts_inference_requests_total": ["model_name"],
                        "ts_inference_latency_microseconds": labels, "ts_queue_latency_microseconds": labels}
    assert made["ts_metrics"]["gauge"] and made["model_metrics"] and made["dimensions"] == ["Level"]
    assert "&" not in text and "*" not in text, "TorchServe would add a host name to each list as often as it stands"
    [line] = said
    assert "lacks ts_inference_latency_microseconds, ts_queue_latency_microseconds, PredictionTime" in line


def test_a_complete_metrics_file_is_taken_as_it_is(tmp_path: Path, said: list[str]) -> None:
    import ts

    users = Path(ts.__file__).parent / "configs" / "metrics.yaml"
    assert complete_metrics_file(users, tmp_path / "metrics.yaml", said.append) == users and not said


@pytest.mark.parametrize("text", ["just words", "ts_metrics: [1, 2]", "[", "model_metrics: 3"])
def test_what_is_no_metrics_file_is_refused_by_name(text: str, tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        complete_metrics_file(tmp_path / "mine.yaml", tmp_path / "metrics.yaml", said.append)
