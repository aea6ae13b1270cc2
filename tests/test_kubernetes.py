"""The manifests fit the schemas of Kubernetes, name what there is, and start the commands as these can be started."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from early_exit.archiver.gateway.cli import TOKEN_VARIABLE
from early_exit.archiver.gateway.cli import parser as gateway_parser
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.cli import parser as serve_parser
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.tokens import KEY_FILE
from early_exit.archiver.watch.cli import parser as watch_parser

FOLDER = Path(__file__).parents[1] / "docs" / "kubernetes"
PARSERS = {"ee-serve": serve_parser, "ee-watch": watch_parser, "ee-gateway": gateway_parser}
Manifest = dict[str, Any]


def manifests(*names: str) -> list[Manifest]:
    return [one for name in names for one in yaml.safe_load_all((FOLDER / name).read_text())]


def of_kserve() -> Manifest:
    """Return the pod that KServe makes; its own fields have no published schema that could be had offline."""
    [service] = manifests("kserve.yaml")
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = dict(service["spec"]["predictor"])
    assert predictor.pop("minReplicas") <= predictor.pop("maxReplicas")
    assert predictor["containers"][0]["name"] == "kserve-container", "the name that KServe looks for"
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": predictor}


def pods() -> list[Manifest]:
    found = [one["spec"]["template"]["spec"] for one in manifests("torchserve.yaml", "ee-watch.yaml")
             if "template" in one["spec"]]
    return [*found, of_kserve()["spec"]]


@pytest.mark.parametrize("manifest", [*manifests("torchserve.yaml", "ee-watch.yaml"), of_kserve()],
                         ids=lambda one: f"{one['kind']} {one['metadata']['name']}")
def test_every_manifest_fits_the_schema_of_its_kind(manifest: Manifest) -> None:
    kubernetes_validate.validate(manifest, "1.34", strict=True)


def test_a_wrong_manifest_would_be_found() -> None:
    wrong = of_kserve()
    wrong["spec"]["containers"][0]["imagee"] = "misspelt"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.34", strict=True)


def test_commands_can_be_started_as_the_manifests_start_them() -> None:
    for pod in pods():
        for container in pod["containers"]:
            parsed = started(container)
            mounted = {one["mountPath"] for one in container["volumeMounts"]}
            for folder in ("/models", "/records"):
                assert any(folder in str(value) for value in vars(parsed).values()) and folder in mounted


def test_the_gateway_beside_a_server_finds_its_port_tokens_and_decisions() -> None:
    [stateful] = [one for one in manifests("torchserve.yaml") if one["kind"] == "StatefulSet"]
    server, gateway = stateful["spec"]["template"]["spec"]["containers"]
    served, asked = started(server), started(gateway)
    assert asked.server == f"http://127.0.0.1:{served.port}"
    assert asked.tokens == served.state / KEY_FILE and asked.model_store == served.model_store
    assert [port["containerPort"] for port in gateway["ports"]] == [asked.port]
    assert TOKEN_VARIABLE in [one["name"] for one in gateway["env"]], "it listens for other machines"
    [watch] = [one for one in manifests("ee-watch.yaml") if one["kind"] == "Deployment"]
    watching = started(watch["spec"]["template"]["spec"]["containers"][0])
    assert asked.watch / watching.model == watching.state


def test_the_image_has_what_every_container_needs() -> None:
    extras = set(re.findall(r"/src\[([\w,]+)\]", (FOLDER / "Dockerfile").read_text())[0].split(","))
    assert {"serve", "train", "gateway"} <= extras


def started(container: Manifest) -> argparse.Namespace:
    program, *arguments = container["command"]
    return PARSERS[program]().parse_args([*arguments, *container["args"]])


def test_every_claim_and_service_that_is_named_is_there() -> None:
    every = manifests("torchserve.yaml", "ee-watch.yaml")
    claims = {one["metadata"]["name"] for one in every if one["kind"] == "PersistentVolumeClaim"}
    for pod in pods():
        volumes = {one["name"]: one["persistentVolumeClaim"]["claimName"] for one in pod["volumes"]}
        assert set(volumes.values()) <= claims
        assert {one["name"] for container in pod["containers"] for one in container["volumeMounts"]} == volumes.keys()
    [stateful] = [one for one in every if one["kind"] == "StatefulSet"]
    [watch] = [one for one in every if one["kind"] == "Deployment"]
    servers = started(watch["spec"]["template"]["spec"]["containers"][0]).server
    assert servers == [f"http://torchserve-{number}.{stateful['spec']['serviceName']}:8080"
                       for number in range(stateful["spec"]["replicas"])], "one for each pod"


@pytest.mark.slow
def test_the_startup_probe_succeeds_when_the_server_answers(recorder_mar: Path, tmp_path: Path) -> None:
    scripts = [container["startupProbe"]["exec"]["command"][-1] for pod in pods() for container in pod["containers"]
               if "startupProbe" in container]
    assert len(scripts) == 2
    server = TorchServe(recorder_mar.parent, tmp_path / "state", Addresses.free(), models=[recorder_mar.name])
    for script in scripts:
        assert probed(script, server) == 1
    with server:
        assert [probed(script, server) for script in scripts] == [0, 0]


def probed(script: str, server: TorchServe) -> int:
    """Run a probe beside a server; return its exit status."""
    here = script.replace("http://127.0.0.1:8080", server.addresses.inference).replace("/tmp/state", str(server.state))
    here = re.sub(r'f"/state/.*?/(\w+\.json)"', rf'"{server.state}/\1"', here)
    return subprocess.run([sys.executable, "-c", here], capture_output=True, timeout=60, check=False).returncode
