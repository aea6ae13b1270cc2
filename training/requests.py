"""What the user's handler makes of request bodies, without a server."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def worker_context(folder: Path, manifest: dict[str, Any]) -> Any:
    """Return TorchServe's context for a worker of an extracted archive, about to serve one request."""
    import ts
    from ts.context import Context, RequestProcessor
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
    from ts.utils.util import get_yaml_config

    model = manifest["model"]
    metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
    metrics.initialize_cache()
    metrics.set_request_ids("sample")
    config = get_yaml_config(str(folder / model["configFile"])) if model.get("configFile") else {}
    context = Context(model["modelName"], str(folder), manifest, 1, None, ts.__version__, True, metrics, config)
    context.request_ids = {0: "sample"}
    context.request_processor = [RequestProcessor({})]
    return context


@contextmanager
def importing_from(folder: Path, *, forget: bool = True) -> Iterator[None]:
    """Import as a TorchServe worker does in that folder.

    Args:
        folder: first on sys.path inside the block.
        forget: whether modules of the folder are removed afterwards, for one that is about to disappear.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before if forget else ():
            origin = getattr(sys.modules[name], "__file__", None)
            if origin and Path(origin).is_relative_to(folder):
                del sys.modules[name]
