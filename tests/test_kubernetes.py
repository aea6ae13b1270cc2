"""The manifests match the schemas of Kubernetes, name only what exists, and start the commands with valid options."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from early_exit.archiver.gateway.cli import parser as gateway_parser
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.cli import addresses_of
from early_exit.archiver.torchserve.cli import parser as serve_parser
from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.tokens import KEY_FILE
from early_exit.archiver.watch.cli import parser as watch_parser
from early_exit.training.environment import GATEWAY_TOKEN

FOLDER = Path(__file__).parents[1] / "docs" / "kubernetes"
PARSERS = {"ee-serve": serve_parser, "ee-watch": watch_parser, "ee-gateway": gateway_parser}
Manifest = dict[str, Any]
CHECKOV = FOLDER.parents[1] / ".venv" / "checkov" / "bin" / "checkov"
needs_checkov = pytest.mark.skipif(not CHECKOV.exists(), reason="checkov is not installed: make policy")


def manifests(*names: str) -> list[Manifest]:
    return [one for name in names for one in yaml.safe_load_all((FOLDER / name).read_text())]


def of_kserve() -> Manifest:
    """Return the pod that KServe makes. No published schema of KServe's own fields is available offline."""
    [service] = manifests("kserve.yaml")
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = dict(service["spec"]["predictor"])
    assert predictor.pop("minReplicas") <= predictor.pop("maxReplicas")
    assert predictor["containers"][0]["name"] == "kserve-container", "the name that KServe looks for"
    metadata = {"name": "predictor", "labels": {"serving.kserve.io/inferenceservice": service["metadata"]["name"]}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": predictor}


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
            for folder in mounted - {"/tmp"}:
                assert any(folder in str(value) for value in vars(parsed).values()), "what is mounted is used"


def test_the_gateway_beside_a_server_finds_its_port_tokens_and_decisions() -> None:
    [stateful] = [one for one in manifests("torchserve.yaml") if one["kind"] == "StatefulSet"]
    server, gateway = stateful["spec"]["template"]["spec"]["containers"]
    served, asked = started(server), started(gateway)
    assert asked.server == f"http://127.0.0.1:{served.port}"
    assert asked.tokens == served.state / KEY_FILE and asked.model_store == served.model_store
    assert asked.host_name == [f"$(POD).{stateful['spec']['serviceName']}"]
    assert [port["containerPort"] for port in gateway["ports"]] == [asked.port]
    assert GATEWAY_TOKEN in [one["name"] for one in gateway["env"]], "it listens for other machines"
    [watch] = [one for one in manifests("ee-watch.yaml") if one["kind"] == "Deployment"]
    watching = started(watch["spec"]["template"]["spec"]["containers"][0])
    assert asked.watch / watching.model == watching.state


def test_each_image_has_what_its_containers_need_and_the_servers_no_nni_and_no_sources() -> None:
    stages = dict(re.findall(r"^FROM [^\n]* AS (\S+)\n(.*?)(?=^FROM|\Z)", (FOLDER / "Dockerfile").read_text(),
                             re.MULTILINE | re.DOTALL))
    extras = {name: set(re.findall(r"/src\[([\w,]+)\]", stages[name])[0].split(","))
              for name in ("build", "build-watch")}
    assert {"serve", "gateway"} <= extras["build"] and "train" not in extras["build"]
    assert {"serve", "train"} <= extras["build-watch"]
    for name, built in (("server", "build"), ("watch", "build-watch")):
        layers = [line for line in stages[name].splitlines() if line.startswith(("COPY", "ADD", "RUN"))]
        *installed, copied = layers
        assert copied == f"COPY --from={built} /opt/early-exit /opt/early-exit", "nothing else is copied"
        assert [re.findall(r" install (?:-\S+ )*([\w ]+) &&", line) for line in installed] == (
            [["procps"]] if name == "server" else []), "TorchServe ends workers with kill, which the slim image lacks"


def test_nothing_but_the_package_is_sent_to_the_image() -> None:
    ignored, *allowed = [line for line in (FOLDER.parents[1] / ".dockerignore").read_text().splitlines()
                         if line and not line.startswith("#")]
    assert ignored == "*"
    assert {line for line in allowed if line.startswith("!")} == {
        "!archiver", "!handler", "!training", "!LICENSE", "!README.md", "!constraints.txt", "!pyproject.toml"}


def test_the_gateways_limits_hold_within_its_pod() -> None:
    [stateful] = [one for one in manifests("torchserve.yaml") if one["kind"] == "StatefulSet"]
    [gateway] = [container for container in stateful["spec"]["template"]["spec"]["containers"]
                 if container["name"] == "gateway"]
    imported = 640  # MiB that the process uses before its first request
    assert gateway["resources"]["limits"]["memory"] == "2Gi"
    assert imported + 6 * started(gateway).max_bytes_in_all / 2**20 < 2048


def mounts(container: Manifest) -> dict[str, tuple[str | None, bool]]:
    """Return, for each volume, the part that a container sees and whether the container may write there."""
    return {mount["name"]: (mount.get("subPathExpr"), not mount.get("readOnly", False))
            for mount in container["volumeMounts"]}


def test_who_serves_an_archive_writes_only_records_and_sees_its_own_keys_only() -> None:
    [deployment] = [manifest for manifest in manifests("ee-watch.yaml") if manifest["kind"] == "Deployment"]
    watch = mounts(deployment["spec"]["template"]["spec"]["containers"][0])
    assert watch["state"] == (None, False) and watch["records"] == (None, False)
    assert watch["models"] == watch["watch"] == (None, True)
    for pod in pods():
        for container in pod["containers"]:
            if container["command"] == ["ee-watch", "cifar"]:
                continue
            seen = mounts(container)
            assert "state" not in seen or seen["state"][0] == "$(POD)"
            assert seen["models"] == (None, False)
            assert not seen.get("watch", (None, False))[1], "it could name the archive that is rolled everywhere"
            if container["command"] == ["ee-gateway"]:
                assert {name for name, (_, writes) in seen.items() if writes} == {"tmp"}
            else:
                assert {name for name, (_, writes) in seen.items() if writes} <= {"tmp", "records", "state"}
                assert "watch" not in seen


def test_clients_reach_the_inference_port_and_the_gateway_and_kserves_pods_are_covered() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in manifests("torchserve.yaml")
                if one["kind"] == "NetworkPolicy"}
    for name, ports in (("torchserve", {8080, 8090}), ("torchserve-kserve", {8080})):
        policy = policies[name]
        assert policy["policyTypes"] == ["Ingress", "Egress"] and "egress" not in policy, "nothing leaves"
        assert {port["port"] for rule in policy["ingress"] if "from" not in rule for port in rule["ports"]} == ports
        management = [rule["from"] for rule in policy["ingress"] if {"port": 8081} in rule["ports"]]
        assert management == ([[{"podSelector": {"matchLabels": {"app": "ee-watch"}}}]] if name == "torchserve" else [])
    labels = policies["torchserve-kserve"]["podSelector"]["matchLabels"]
    assert labels == of_kserve()["metadata"]["labels"], "what KServe gives its pods, and no other team's"


def test_each_pod_is_covered_by_a_policy_and_the_watcher_and_the_metrics_are_for_those_alone_who_are_named() -> None:
    documents = manifests("torchserve.yaml", "ee-watch.yaml")
    policies = {one["metadata"]["name"]: one["spec"] for one in documents if one["kind"] == "NetworkPolicy"}
    labels = {one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"] for one in documents
              if "template" in one["spec"]}
    assert labels.keys() == {"torchserve", "ee-watch"}
    for name, of_the_pods in labels.items():
        assert policies[name]["podSelector"] == {"matchLabels": of_the_pods}, "a policy for no pod closes nothing"
    watcher, monitoring = ({"podSelector": {"matchLabels": labels["ee-watch"]}},
                           {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}})
    for name, admitted in (("torchserve", [watcher, monitoring]), ("torchserve-kserve", [monitoring])):
        assert [rule["from"] for rule in policies[name]["ingress"] if {"port": 8082} in rule["ports"]] == [
            [one] for one in admitted]
    assert policies["ee-watch"]["policyTypes"] == ["Ingress", "Egress"] and "ingress" not in policies["ee-watch"]
    servers, names = policies["ee-watch"]["egress"]
    assert servers["to"] == [{"podSelector": {"matchLabels": labels["torchserve"]}}]
    assert {port["port"] for port in names["ports"]} == {53}


def test_a_port_is_open_to_other_pods_where_a_policy_admits_somebody_and_the_gateway_lends_no_full_passes() -> None:
    served = {container["name"]: addresses_of(started(container)) for pod in pods() for container in pod["containers"]
              if container["command"][0] == "ee-serve"}
    admitted = {one["metadata"]["name"]: {port["port"] for rule in one["spec"]["ingress"] for port in rule["ports"]}
                for one in manifests("torchserve.yaml") if one["kind"] == "NetworkPolicy"}
    for name, policy in (("torchserve", "torchserve"), ("kserve-container", "torchserve-kserve")):
        opened = {int(address.rsplit(":", 1)[1]) for address in vars(served[name]).values() if "//0.0.0.0:" in address}
        assert opened == admitted[policy] - {8090}, name
    [gateway] = [container for pod in pods() for container in pod["containers"] if container["name"] == "gateway"]
    assert started(gateway).secret is None and started(gateway).host == "0.0.0.0"


JUSTIFIED = {
    "CKV_K8S_8": "ee-watch answers nobody; it ends when it fails",
    "CKV_K8S_9": "ee-watch answers nobody",
    "CKV_K8S_11": "a limit on cores throttles requests in the middle of a batch",
    "CKV_K8S_15": "the tag names one image",
    "CKV_K8S_21": "whoever applies them chooses the namespace",
    "CKV_K8S_35": "the gateway's token is a variable, which code of archives, in another container, does not see",
    "CKV_K8S_43": "the digest is known when somebody has built the image",
    "CKV_DOCKER_2": "Kubernetes asks by probes"}


def refused(folder: Path, **made: list[Manifest]) -> dict[str, set[str]]:
    """Return the checks of the policy tool checkov that fail, by the name of the set of manifests, or for the
    Dockerfile."""
    for name, of_the_set in made.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump_all(of_the_set))
    shutil.copy(FOLDER / "Dockerfile", folder)
    done = subprocess.run([CHECKOV, "--directory", folder, "--framework", "kubernetes", "dockerfile", "--output",
                           "json", "--skip-download", "--skip-check", ",".join(JUSTIFIED)],
                          text=True, capture_output=True, timeout=120, check=False)
    reports = json.loads(done.stdout)
    assert {report["check_type"] for report in reports} == {"kubernetes", "dockerfile"}, done.stderr
    assert all(report["summary"]["passed"] > 10 and not report["summary"]["parsing_errors"] for report in reports)
    against: dict[str, set[str]] = {name: set() for name in (*made, "Dockerfile")}
    seen = {Path(passed["file_path"]).stem for report in reports for passed in report["results"]["passed_checks"]}
    assert seen == against.keys()
    for failed in (failed for report in reports for failed in report["results"]["failed_checks"]):
        against[Path(failed["file_path"]).stem].add(
            f"{failed['check_id']} {failed['check_name']}: {failed['resource']}")
    return against


@pytest.mark.slow
@needs_checkov
def test_a_policy_tool_finds_nothing_against_the_manifests_and_would(tmp_path: Path) -> None:
    made, bare = ([*manifests("torchserve.yaml", "ee-watch.yaml"), of_kserve()] for _ in range(2))
    for manifest in bare:
        pod = manifest["spec"].get("template", manifest)["spec"]
        pod.pop("securityContext", None)
        pod.pop("automountServiceAccountToken", None)
        for container in pod.get("containers", []):
            container.pop("securityContext")
    against = refused(tmp_path, made=made, bare=bare)
    assert against["made"] == against["Dockerfile"] == set()
    found = {failed.split()[0] for failed in against["bare"]}
    assert found >= {"CKV_K8S_20", "CKV_K8S_22", "CKV_K8S_31", "CKV_K8S_37", "CKV_K8S_38"}


def started(container: Manifest) -> argparse.Namespace:
    program, *arguments = container["command"]
    return PARSERS[program]().parse_args([*arguments, *container["args"]])


def test_every_claim_and_service_that_is_named_is_there() -> None:
    every = manifests("torchserve.yaml", "ee-watch.yaml")
    claims = {one["metadata"]["name"] for one in every if one["kind"] == "PersistentVolumeClaim"}
    for pod in pods():
        volumes = {volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName")
                   for volume in pod["volumes"]}
        assert set(volumes.values()) <= {*claims, None}
        assert [name for name, claim in volumes.items() if claim is None] == ["tmp"]
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
    """Run a probe's script against a server; return its exit status."""
    here = script.replace("http://127.0.0.1:8080", server.addresses.inference).replace("/tmp/state", str(server.state))
    here = here.replace('"/state/', f'"{server.state}/')
    return subprocess.run([sys.executable, "-c", here], capture_output=True, timeout=60, check=False).returncode
