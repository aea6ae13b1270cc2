"""The manifests fit the schemas of Kubernetes, name what there is, and start the commands as these can be started."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from early_exit.archiver.serve import _parser as serve_parser
from early_exit.archiver.watch import _parser as watch_parser

FOLDER = Path(__file__).parents[1] / "docs" / "kubernetes"
PARSERS = {"ee-serve": serve_parser, "ee-watch": watch_parser}
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


def test_the_probes_script_is_python() -> None:
    for pod in pods():
        for container in pod["containers"]:
            if probe := container.get("readinessProbe"):
                compile(probe["exec"]["command"][-1], "readinessProbe", "exec")
