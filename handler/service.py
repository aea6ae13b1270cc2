"""The class that TorchServe loads.

TorchServe imports this module. It requires exactly one class and no function called `handle` in it, so everything that
can be tested without TorchServe is elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.config import EARLY, ServingConfig
from early_exit.handler.serving.worker import Worker
from early_exit.handler.torchserve.batch import answer, calls_of, is_in_envelope
from early_exit.handler.torchserve.continuous_batching import claim_only_worker, require_continuous_batching
from early_exit.handler.torchserve.host import TorchServeHost


class EarlyExitService:
    """Serves an archive of `ee-archive`: the user's handler around a model with early exits."""

    def initialize(self, context: Any) -> None:
        """Load a worker from the model directory.

        Raises:
            EarlyExitError: the configuration or a file of the archive is wrong; TorchServe logs the message.
        """
        host, folder = TorchServeHost(context), Path(context.system_properties["model_dir"])
        if ServingConfig.from_model_config(host.model_config).answers == EARLY:
            require_continuous_batching(host.model_config)
            self.claim = claim_only_worker(ArchiveLayout(folder))
        self.worker = Worker.load(folder, host)

    def handle(self, data: list[Any], context: Any) -> list[Any]:
        """Return one response per request, in order; with early answers some requests are left for later calls."""
        in_envelope = is_in_envelope()
        calls = calls_of(data, context, in_envelope=in_envelope)
        replies = self.worker.step(calls)
        while in_envelope and None in replies:  # an envelope takes all answers at once
            replies = self.worker.step(calls)
        return answer(replies, context, in_envelope=in_envelope)
