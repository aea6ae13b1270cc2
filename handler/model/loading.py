"""Builds the model of a version from an archive's folder, with the parts that its plan and configuration require."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch

from early_exit.handler.archive_layout import ArchiveLayout
from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.pooling import Side
from early_exit.handler.config import EARLY, PLAIN, ServingConfig
from early_exit.handler.cuda.executor import plain_executor
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.engines.registry import DEFAULT_ENGINE, ENGINES
from early_exit.handler.errors import ConfigError
from early_exit.handler.exits.head import Head
from early_exit.handler.exits.plan import ExitPlan, build_heads, load_plan
from early_exit.handler.inference.bypass import AdaptiveBypass
from early_exit.handler.inference.bypassing import EpochBypass
from early_exit.handler.inference.continuous import ContinuousExecutor
from early_exit.handler.model.assembly import Assembly
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.shadow import ShadowSampler


def build_model(backbone: Backbone, plan: ExitPlan | None = None, heads: Mapping[str, Head] | None = None,
                *, engine: str = DEFAULT_ENGINE, answers: str = PLAIN, sampling_rate: float = 0.0,
                sampling_rate_in_full: float | None = None, record_layers: int = 0, record_pool: Side = None,
                control_rate: float = 0.0, anytime: bool = False) -> EarlyExitModel:
    """Return a model that serves a backbone.

    Args:
        backbone: the backbone, on the device that serves.
        plan: the plan with the exits, or None to answer every row in full.
        heads: the heads by layer path, one for each exit of the plan.
        engine: the engine that executes the backbone: a name in `ENGINES`, or an identity.
        answers: when answers are sent. With `PLAIN`, all answers of a batch are sent together; with `EARLY`, each
            answer is sent as soon as it is ready.
        sampling_rate: the share of rows that are shadow rows.
        sampling_rate_in_full: the share after the last fallback level is reached; by default it does not change.
        record_layers: the largest number of candidate layers that are recorded, besides those with an exit; with 0,
            nothing is recorded.
        record_pool: the side to which recorded activations are pooled.
        control_rate: the share of batches that measure whether the exits save time.
        anytime: whether every request gets the scores of every exit.

    Raises:
        PlanError: the plan's heads and certificate are about another engine.
        ConfigError: the backbone is that of a detector, which the engine does not execute.
    """
    assembly = Assembly(backbone, plan, heads, engine=engine, record_layers=record_layers)
    record = assembly.recorder(record_pool) if record_layers else None
    bypass = AdaptiveBypass(control_rate, random.SystemRandom().random)
    shadow = ShadowSampler(sampling_rate, sampling_rate_in_full)
    if answers == EARLY:
        executor = ContinuousExecutor(assembly.levels, record)
        return EarlyExitModel(assembly, executor, EpochBypass(bypass), shadow, anytime=anytime)
    return EarlyExitModel(assembly, plain_executor(assembly.levels, record), bypass, shadow, anytime=anytime)


def load_model(layout: ArchiveLayout, config: ServingConfig, device: torch.device | str = "cpu") -> EarlyExitModel:
    """Load the model of an extracted archive, so that it serves and records as configured.

    Raises:
        EarlyExitError: a file of the archive is damaged, too new, or belongs to another backbone, or the engine does
            not run on the device.
    """
    if torch.device(device).type != "cpu" and not ENGINES[config.engine].on_gpu:
        raise ConfigError(f"early_exit.engine is {config.engine!r}, which runs on the CPU, but this worker was "
                          f"given {device}: set 'deviceType: cpu' in model-config.yaml, or another engine")
    backbone = load_backbone(layout.folder, device)
    plan, heads = None, None
    if config.exits and layout.plan.exists():
        plan, tensors = load_plan(layout.plan)
        heads = build_heads(plan, tensors, backbone.description)
    records = config.records_folder() is not None
    sampled = records or (plan is not None and plan.certificate is not None)  # the monitor needs samples, too
    return build_model(backbone, plan, heads, engine=config.engine, answers=config.answers,
                       record_layers=config.layers if records else 0, record_pool=config.pool_side,
                       sampling_rate=config.sampling(has_exits=plan is not None) if sampled else 0.0,
                       sampling_rate_in_full=config.sampling(has_exits=False) if records else 0.0,
                       control_rate=config.control_rate, anytime=config.anytime).to(device)
