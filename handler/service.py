"""The class that TorchServe loads.

TorchServe imports this module, requires exactly one class in it and no function called `handle`, so
everything that could be tested without TorchServe lives elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.config import EARLY, ServingConfig
from early_exit.handler.detection.detections import with_nulls
from early_exit.handler.errors import ArchiveError
from early_exit.handler.model import EarlyExitModel
from early_exit.handler.monitor.shared_state import watch
from early_exit.handler.recording.format import ShardHeader
from early_exit.handler.recording.writer import RecordWriter
from early_exit.handler.serving.early import UNANSWERED, EarlyAnswers, claim_only_worker, require_continuous_batching
from early_exit.handler.serving.isolation import answer_items, context_of
from early_exit.handler.serving.probe import answer_probe, is_probe
from early_exit.handler.serving.telemetry import Telemetry
from early_exit.handler.torchserve.allocator import return_freed_memory
from early_exit.handler.torchserve.metric_lines import ServingMetrics
from early_exit.handler.user_handler.wrapper import load_user_handler


class EarlyExitService:
    """Serves an archive of `ee-archive`: the user's handler around a model with early exits."""

    def initialize(self, context: Any) -> None:
        """Load backbone, plan and the user's handler from the model directory.

        Raises:
            EarlyExitError: the configuration or a file of the archive is wrong; TorchServe logs the message.
        """
        config = ServingConfig.from_model_config(context.model_yaml_config)
        layout = ArchiveLayout(Path(context.system_properties["model_dir"]))
        is_early = config.answers == EARLY
        if is_early:
            require_continuous_batching(context.model_yaml_config)
            self.claim = claim_only_worker(layout)
        gpu = context.system_properties.get("gpu_id")
        device = torch.device("cuda", gpu) if torch.cuda.is_available() and gpu is not None else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # streams and graphs are made there
        self.model = EarlyExitModel.load(layout, config, device)
        return_freed_memory()
        # Before anything comes through: graphs follow each other only in the order in which they are captured.
        self.model.prepare(int(context.system_properties.get("batch_size", 1)), at_once=not is_early)
        version = str(context.manifest["model"].get("modelVersion", "1.0"))
        root = config.records_folder()
        header = ShardHeader(context.model_name, version, self.model.description.sha256, config.pool_side,
                             self.model.layers, self.model.engine_identity)
        writer = RecordWriter(root, header, config) if root else None
        watchman = watch(self.model.plan, header.folder(root) if root else None, version)
        metrics = ServingMetrics(context.metrics, context.model_name, version)
        self.inner = load_user_handler(json.loads(layout.original_manifest.read_text()), context, self.model)
        answer_probe(self.model)
        self.bookkeeper = Telemetry(self.model, version, metrics, writer, keep_requests=config.keep_requests,
                                     watchman=watchman, labels=getattr(self.inner, "mapping", None))
        self.early = EarlyAnswers(self.model, self.inner, self.bookkeeper) if is_early else None

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        """Return one response per request, in order; with early answers some requests are left for later calls."""
        responses = self._respond(data, context)
        for item, response in enumerate(responses):
            if self.model.description.detector is not None:
                responses[item] = with_nulls(response)
            if response is UNANSWERED:
                del context.request_ids[item]  # TorchServe answers those that are in there
                responses[item] = None
        return responses

    def _respond(self, data: list[Any], context: Any) -> list[Any]:
        headers = [context.get_all_request_header(item) for item in range(len(data))]
        others = [item for item in range(len(data)) if not is_probe(headers[item])]
        if len(others) == len(data):
            return self._answer(data, context)
        responses: list[Any] = [None] * len(data)
        for item in set(range(len(data))) - set(others):
            try:
                responses[item] = answer_probe(self.model)
            except ArchiveError as error:
                context.set_response_status(500, "ProbeFailed", item)
                responses[item] = {"code": 500, "type": "ProbeFailed", "message": str(error)}
        if others:
            answers = self._answer([data[item] for item in others], context_of(others, context))
            for item, response in zip(others, answers):
                responses[item] = response
        return responses

    def _answer(self, data: list[Any], context: Any) -> list[Any]:
        if self.early is not None:
            return self.early.step(data, context)
        responses: list[Any] = [None] * len(data)
        for served in answer_items(data, context, self.inner, self.model):
            for item, response in zip(served.items, served.responses):
                responses[item] = response
            self.bookkeeper.note(served, data, context)
        return responses
