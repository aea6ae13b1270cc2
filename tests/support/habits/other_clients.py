"""Clients that do not use the REST API for predictions, but gRPC or workflows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import grpc
import requests
import yaml
from workflow_archiver.workflow_packaging import package_workflow
from workflow_archiver.workflow_packaging_utils import WorkflowExportUtils

from early_exit.archiver.torchserve.process import TorchServe
from early_exit.archiver.torchserve.tokens import read_token
from tests.support.habits.agreement import Answer

_PREDICTIONS = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
_NODE = "model"
_PASS_ON = """
def pass_on(data, context):
    if data is None:
        return None
    return [row.get("data") or row.get("body") for row in data]
"""


def over_grpc(server: TorchServe, model: str, version: str, body: bytes) -> Answer:
    """Return the answer to a call over gRPC. An error has the status 500."""
    request = _field(1, model.encode()) + _field(2, version.encode()) + _field(
        3, _field(1, b"data") + _field(2, body))
    token = read_token(server.key_file, "inference")
    with grpc.insecure_channel(server.grpc_addresses["inference"]) as channel:
        call = channel.unary_unary(_PREDICTIONS, request_serializer=bytes, response_deserializer=bytes)
        try:
            response = call(request, timeout=120, metadata=[("protocol", "gRPC"), ("authorization", f"Bearer {token}")])
        except grpc.RpcError as error:
            return Answer(500, {}, str(error).encode())
    return Answer(200, {}, _first_field(response))


def through_workflow(server: TorchServe, workflow: str, body: bytes) -> Answer:
    """Return the answer of a workflow."""
    token = read_token(server.key_file, "inference")
    response = requests.post(f"{server.addresses.inference}/wfpredict/{workflow}", body, timeout=120,
                             headers={"Authorization": f"Bearer {token}"})
    return Answer(response.status_code, {name.lower(): value for name, value in response.headers.items()},
                  response.content)


@contextmanager
def workflow(server: TorchServe, name: str, file_name: str) -> Iterator[None]:
    """Serve a workflow inside the block. It passes its requests on to an archive of the model store."""
    folder = server.state / "workflows" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pass_on.py").write_text(_PASS_ON)
    specification = {"models": {"min-workers": 1, "max-workers": 1, "batch-size": 4, "max-batch-delay": 40,
                                _NODE: {"url": file_name}}, "dag": {"pass_on": [_NODE]}}
    (folder / "specification.yaml").write_text(yaml.safe_dump(specification))
    options = SimpleNamespace(workflow_name=name, spec_file=str(folder / "specification.yaml"),
                              handler=str(folder / "pass_on.py"), export_path=str(server.model_store),
                              extra_files=None, force=True)
    package_workflow(options, WorkflowExportUtils.generate_manifest_json(options))
    allowed = {"Authorization": f"Bearer {read_token(server.key_file, 'management')}"}
    address = f"{server.addresses.management}/workflows"
    response = requests.post(address, params={"url": f"{name}.war"}, headers=allowed, timeout=300)
    assert response.ok, response.text
    try:
        yield
    finally:
        requests.delete(f"{address}/{name}", headers=allowed, timeout=60)


def _field(number: int, value: bytes) -> bytes:
    """Return an encoded field of a protobuf message. The value is preceded by its length."""
    size, length = len(value), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + value


def _first_field(message: bytes) -> bytes:
    """Return the value of the first field of a protobuf message. The value is preceded by its length."""
    length, shift, start = 0, 0, 1
    while True:
        byte = message[start]
        length, shift, start = length | (byte & 127) << shift, shift + 7, start + 1
        if byte < 128:
            return message[start:start + length]
