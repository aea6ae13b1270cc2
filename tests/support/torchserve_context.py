"""TorchServe's own context and envelopes, around a worker in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ts.context import Context, RequestProcessor
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from early_exit.handler.service import EarlyExitService
from early_exit.handler.serving.worker import Worker

OVER_HTTP = {"Host": "localhost:8080"}


def service_of(worker: Worker) -> EarlyExitService:
    """Return an instance of the class that TorchServe loads, around a worker."""
    service = EarlyExitService.__new__(EarlyExitService)
    service.worker = worker
    return service


def predict(handle: Callable[[Any, Context], Any], requests: Sequence[Mapping[str, Any]], *,
            headers: Sequence[Mapping[str, str]] = (), model: str = "model",
            ids: Sequence[str] = ()) -> tuple[Any, Context]:
    """Call the function that TorchServe calls in an archive for a batch; return its result and the context.

    Args:
        handle: the function of the service, or of an envelope around it.
        requests: the requests, each by the names of its parts.
        headers: the headers of each request, by default those of a call over HTTP.
        model: the name under which the model is served.
        ids: the id of each request, by default id-0, id-1 and so on.
    """
    context = Context(model, ".", {"model": {"modelName": model}}, 8, None, "0.12.0", True,
                      MetricsCacheYamlImpl.__new__(MetricsCacheYamlImpl), {})
    context.request_ids = dict(enumerate(ids or [f"id-{number}" for number in range(len(requests))]))
    context.request_processor = [RequestProcessor({"body": {"content-type": "application/json"}, **own})
                                 for own in headers or [OVER_HTTP] * len(requests)]
    return handle([dict(request) for request in requests], context), context
