"""Run by `validate` in a fresh process: a TorchServe worker's load and first requests, without TorchServe.

Usage: first_run.py MODEL_DIR
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    from early_exit.handler.protocol import EXIT_HEADER, PROBE_HEADER, SECRET_HEADER, SECRET_VARIABLE

    secret = os.environ[SECRET_VARIABLE] = secrets.token_hex(24)  # of this run, before the worker loads
    import ts
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
    from ts.model_loader import ModelLoaderFactory
    from ts.service import Service

    manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    metrics.initialize_cache()
    service = ModelLoaderFactory.get_model_loader().load(
        manifest["modelName"], str(folder), manifest["handler"], None, 1, None, True, metrics)
    from early_exit.handler.archive_layout import ArchiveLayout

    def answer(body: bytes, headers: dict[str, str]) -> tuple[str, Any]:
        """Return the exit that answered, empty where none is told, and the answer as a client reads it."""
        processors, data, ids = Service.retrieve_data_for_inference([{
            "requestId": b"first-run",
            "parameters": [{"name": "body", "contentType": "application/octet-stream", "value": body}],
            "headers": [{"name": name.encode(), "value": value.encode()} for name, value in headers.items()],
        }])
        service.context.request_processor, service.context.request_ids = processors, ids
        metrics.set_request_ids(ids)
        responses = service._entry_point(data, service.context)
        while not service.context.request_ids:  # with early answers it comes again until it is answered
            service.context.request_ids = {0: "first-run"}
            responses = service._entry_point(data, service.context)
        status, _ = service.context.get_response_status(0)
        if status != 200:
            sys.exit(f"a request was answered with {status}: {responses[0]}")
        return service.context.get_response_headers(0).get(EXIT_HEADER, ""), as_read(responses[0])

    answer(b"", {PROBE_HEADER: "1", SECRET_HEADER: secret})
    answers: dict[str, Any] = {}
    sample = ArchiveLayout(folder).sample_request
    if sample.exists():
        body = sample.read_bytes()
        before = answer(body, {})
        # What differs from call to call, such as a time, is nothing to compare a server's answer with.
        if before[1] is not None and answer(body, {}) == before:
            model = service._entry_point.__self__.worker.model
            for level in range(model.assembly.last_level + 1):  # the last one answers in full
                model.fall_back(level)
                left_at, said = answer(body, {})
                answers.setdefault(left_at, said)
    print(json.dumps(answers))


def as_read(response: Any) -> Any:
    """Return a response as one reads it who gets it from TorchServe: parsed JSON, else text; None for bytes."""
    try:
        text = response if isinstance(response, (str, bytes, bytearray)) else json.dumps(response)
        text = text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main(Path(sys.argv[1]))
