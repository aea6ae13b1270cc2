"""A worker answers the calls that a host hands to it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from early_exit.handler.allocator import return_freed_memory
from early_exit.handler.archive_layout import ArchiveLayout, read_manifest
from early_exit.handler.call import Call, Reply, share_instances
from early_exit.handler.config import EARLY, ServingConfig
from early_exit.handler.errors import ArchiveError
from early_exit.handler.exits.switch import ExitSwitch
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import load_model
from early_exit.handler.model.probe import answer_probe, require_exported
from early_exit.handler.monitor.shared_state import SharedMonitor, watch
from early_exit.handler.protocol import PROBE_HEADER
from early_exit.handler.recording.content import ContentKey
from early_exit.handler.recording.format import ShardHeader
from early_exit.handler.recording.writer import RecordWriter
from early_exit.handler.sample_request import headers_with, samples_in
from early_exit.handler.serving.batch_answers import BatchAnswers
from early_exit.handler.serving.early_answers import EarlyAnswers
from early_exit.handler.serving.host import Host
from early_exit.handler.serving.metrics import ServingMetrics
from early_exit.handler.serving.operator_headers import OperatorHeaders
from early_exit.handler.serving.ownership import RowOwnership
from early_exit.handler.serving.recording import Recording
from early_exit.handler.serving.response_headers import ResponseHeaders
from early_exit.handler.serving.shadow_items import Sampling
from early_exit.handler.serving.telemetry import Monitoring, Reporting, SideWork, Telemetry
from early_exit.handler.user_handler.context import HandlerContext
from early_exit.handler.user_handler.description import HandlerDescription
from early_exit.handler.user_handler.entry_point import UserHandler
from early_exit.handler.user_handler.traffic import digests_of, traffic_identity
from early_exit.handler.user_handler.wrapper import load_user_handler

logger = logging.getLogger(__name__)


class Worker:
    """The user's handler around a model with early exits."""

    def __init__(self, model: EarlyExitModel, handler: UserHandler, context: HandlerContext, config: ServingConfig,
                 host: Host, description: HandlerDescription, traffic: str = "") -> None:
        """Combine the parts, and begin the side work that the configuration requires.

        Args:
            model: the model, prepared for batches.
            handler: the user's handler, which calls the model.
            context: the handler's context.
            config: how the version serves and records.
            host: the host that hands over calls.
            description: the description of the handler.
            traffic: identity of the traffic that the version gets; empty if it is not known.
        """
        self.model = model
        if (plan := model.assembly.plan) is not None and plan.certificate and not plan.is_certified_for(traffic):
            logger.error("the plan's certificate is about other traffic than this version gets: the handler, its files "
                         "or its configuration have changed since. Therefore, no request leaves early until a plan is "
                         "made from records of this traffic, as ee-watch does")
            model.fall_back(model.assembly.last_level)
        model.switch = ExitSwitch.of_environment(host.model)
        ownership = RowOwnership(description)
        telemetry, self._closing = _telemetry(model, config, host, ownership, getattr(handler, "mapping", None),
                                              traffic)
        self.is_early = config.answers == EARLY
        """Whether each answer is sent as soon as it is ready, so that several calls of the handler are in progress."""
        self._answers = (EarlyAnswers(model, handler, context, telemetry) if self.is_early else
                         BatchAnswers(model, handler, context, ownership, telemetry))
        self._headers = OperatorHeaders.of_environment(are_open=config.open_headers)

    @classmethod
    def load(cls, folder: Path, host: Host) -> Worker:
        """Load backbone, plan and the user's handler from an extracted archive.

        Args:
            folder: the archive's folder; it is the working directory, and on `sys.path`, as the user's handler expects.
            host: the host that hands over calls.

        Raises:
            EarlyExitError: the configuration or a file of the archive is wrong.
        """
        config = ServingConfig.from_model_config(host.model_config)
        layout = ArchiveLayout(folder)
        model = load_model(layout, config, host.device)
        return_freed_memory()
        # Before the first batch: the graphs of stages can follow each other only if they are captured in that order.
        model.prepare(host.batch_size)
        manifest = read_manifest(layout.original_manifest)
        context = HandlerContext(host.context, manifest, host.model_config)
        description = HandlerDescription.load(layout.handler_description)
        # Before the handler is loaded, because it may write into its folder.
        digests = digests_of(folder, description.files or ())
        if changed := [name for name, digest in digests.items() if digest != (description.files or {})[name]]:
            logger.warning("%s changed since the archive was made, so records count as other traffic: a handler that "
                           "writes files should write them elsewhere", ", ".join(changed))
        traffic = traffic_identity(model.assembly.description.sha256, manifest, description, digests,
                                   host.model_config)
        handler = load_user_handler(manifest, context, model, description, partial(_answer_sample, layout, context),
                                    partial(require_exported, model))
        answer_probe(model)  # after the handler, which may have changed weights or settings of torch
        return cls(model, handler, context, config, host, description, traffic)

    def step(self, calls: Sequence[Call]) -> list[Reply | None]:
        """Return a reply for each call, in order.

        With early answers, the reply to a call that cannot be answered yet is None. The host hands this call over again
        in the next step, together with new calls; a call that it does not hand over again is cancelled. Without early
        answers, every call is answered.

        Raises:
            MemoryError, torch.AcceleratorError: this worker is out of memory, or its device has failed.
        """
        calls = [self._headers.admit(call) for call in calls]
        is_one_list = share_instances(calls)  # a probe cannot be recognized in the common list
        replies: list[Reply | None] = [
            self.probe(call) if call.has_header(PROBE_HEADER) and not is_one_list else None for call in calls]
        others = [position for position, reply in enumerate(replies) if reply is None]
        if others or self.is_early:
            for position, reply in zip(others, self._answers.step([calls[position] for position in others])):
                replies[position] = reply
        return replies

    def probe(self, call: Call) -> Reply:
        """Answer a probe: does this version compute the scores that it computed when its archive was made?"""
        try:
            return Reply(call.body([answer_probe(self.model)]))
        except ArchiveError as error:
            body = {"code": 500, "type": "ProbeFailed", "message": str(error)}
            return Reply(call.body([body]), 500, "ProbeFailed")

    def close(self) -> None:
        """Write the remaining records, share the monitor's state, and stop the threads that do so."""
        for part in self._closing:
            part.close()


def _answer_sample(layout: ArchiveLayout, context: HandlerContext, handler: UserHandler) -> None:
    """Let a handler answer the archive's first sample request, if it has one."""
    for sample in samples_in(layout)[:1]:
        call = Call("sample", sample.inputs(), headers_with({part.name: part.content_type for part in sample.parts}))
        context.begin([call])
        handler.handle([*call.items], context)


def _telemetry(model: EarlyExitModel, config: ServingConfig, host: Host, ownership: RowOwnership,
               labels: Any, traffic: str) -> tuple[Telemetry, list[RecordWriter | SharedMonitor]]:
    """Return the side work that a configuration requires, and the parts that must be closed at the end."""
    assembly, root = model.assembly, config.records_folder()
    header = ShardHeader(host.model, host.version, assembly.description.sha256, config.pool_side, assembly.layers,
                         assembly.engine_identity, traffic)
    writer = RecordWriter(root, header, config) if root else None
    is_certified = assembly.plan is not None and assembly.plan.is_certified_for(traffic)
    monitor = watch(assembly.plan, header.folder(root) if root else None, host.version) if is_certified else None
    metrics = ServingMetrics(host, assembly)
    sampling = Sampling(writer.contents if writer is not None else ContentKey(None))
    work: dict[str, SideWork] = {"headers": ResponseHeaders(model, host.version, labels).set}
    if writer is not None:
        work["records"] = Recording(model, writer, sampling, keep_requests=config.keep_requests).note
    if monitor is not None:
        work["monitor"] = Monitoring(model, monitor, sampling).note
    work["metrics"] = Reporting(model, metrics, writer, monitor, ownership).note
    return Telemetry(metrics, work), [part for part in (writer, monitor) if part is not None]
