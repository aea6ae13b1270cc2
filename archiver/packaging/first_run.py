"""Run by `validate` in a fresh process: a TorchServe worker's load and first requests, without TorchServe.

Usage: first_run.py MODEL_DIR
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(folder: Path) -> None:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
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
    from early_exit.handler.protocol import PROBE_HEADER

    def answer(body: bytes, headers: dict[str, str]) -> object:
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
        return responses[0]

    outcome = answer(b"", {PROBE_HEADER: "1"})
    sample = ArchiveLayout(folder).sample_request
    if sample.exists():
        answer(sample.read_bytes(), {})
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
