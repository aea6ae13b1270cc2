"""One row of the paper's tables: what exits do on requests that were not used for choosing them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.engines.registry import DEFAULT_ENGINE, ENGINES
from early_exit.handler.exits.head import Head
from early_exit.handler.exits.inference_head import InferenceHead
from early_exit.handler.exits.policy import ConfidencePolicy, PlannedPolicy
from early_exit.handler.inference.forward import Answers, Exit, Stage, run_with_exits
from early_exit.handler.protocol import FULL
from early_exit.training.costs.profiling import one_thread
from early_exit.training.report.ltma import AllocationCounter, ltma
from early_exit.training.report.performance import categorize
from tests.benchmarks.tables import judgement, tables
from tests.support.timing import interleaved, ratio_of_sums

BATCH = 250
"""The batch size for everything that is not timed."""
N_TIMED, SIZES = 640, (1, 8, 32)
"""The number of requests, the first ones, that are timed, and the sizes of the batches in which they come."""


def row(backbone: Backbone, exits: Mapping[str, Exit], inputs: Tensor, truth: Tensor, full: Tensor) -> dict[str, Any]:
    """Measure exits on requests.

    Args:
        backbone: the backbone that has the exits.
        exits: the exits, with heads as they were trained. Keys are layer paths.
        inputs: the inputs of the requests, (M, ...).
        truth: the true classes, (M,).
        full: the backbone's scores for the requests, (M, K).
    """
    exits = {path: as_served(exit_) for path, exit_ in exits.items()}
    layers = [layer for layer in backbone.description.candidates if layer.path in exits]
    engine = ENGINES[DEFAULT_ENGINE]
    plain = engine.unsplit(backbone)
    parts = engine.compile(backbone, [layer.node for layer in layers])
    ends: list[Exit | None] = [exits[layer.path] for layer in layers]
    stages = [Stage(part.module.forward, end) for part, end in zip(parts, [*ends, None])]
    counter = AllocationCounter()
    with torch.no_grad(), counter:
        answers = [run_with_exits((batch,), stages) for batch in inputs.split(BATCH)]
    ltma_bytes = (inputs.nbytes + counter.n_bytes) / len(inputs)
    one_batch = inputs[:BATCH]
    outputs = torch.cat([one.outputs for one in answers])
    classes = outputs.argmax(dim=1)
    taken = torch.cat([one.stages for one in answers])
    names = [*(layer.path for layer in layers), "full"]
    heads = [_flops(exits[layer.path], layer.shape) / backbone.description.flops for layer in layers]
    before = (full.argmax(dim=1) == truth).double().mean().item()
    accuracy = (classes == truth).double().mean().item()
    left = taken != FULL
    held = [*backbone.parameters(), *backbone.graph.buffers()]
    parameters, n_bytes = sum(p.numel() for p in backbone.parameters()), sum(one.nbytes for one in held)
    of_heads = [one for layer in layers for one in _parameters(exits[layer.path])]
    flops, flops_ratio = backbone.description.flops, _flops_ratio(taken, [one.cost for one in layers], heads)
    binary = {} if full.shape[1] > 2 else {"auc": _auc(outputs, truth), "auc_before": _auc(full, truth)}
    return {
        "accuracy": accuracy, **binary,
        "accuracy_loss": before - accuracy,
        # What a constant answer would reach: a model that is little better has little to lose.
        "majority_accuracy": truth.bincount().max().item() / len(truth),
        "disagreement": (classes != full.argmax(dim=1)).double().mean().item(),
        "hits": {name: (taken == (number if name != "full" else FULL)).double().mean().item()
                 for number, name in enumerate(names)},
        "flops_ratio": flops_ratio, "flops_before": flops, "flops": round(flops * flops_ratio),
        "flops_ratio_of_timed": _flops_ratio(taken[:N_TIMED], [one.cost for one in layers], heads),
        "cpu_time_ratio": time_ratios(inputs[:N_TIMED], plain, stages),
        "ltma_bytes": ltma_bytes, "ltma_ratio": ltma_bytes / (ltma(plain, (one_batch,)) / len(one_batch)),
        "categories": asdict(categorize(classes[left], full[left].argmax(dim=1), truth[left])),
        "size_ratio": 1 + sum(one.numel() for one in of_heads) / parameters,
        "megabytes_before": n_bytes / 1e6, "megabytes": (n_bytes + sum(one.nbytes for one in of_heads)) / 1e6,
        **_tables(inputs, truth, layers, stages, full, heads),
    }


def as_served(exit_: Exit) -> Exit:
    """Return an exit of any method in the form in which it would serve: its head takes fewer operations."""
    policy = exit_.policy
    if not isinstance(exit_.head, Head):
        raise TypeError(f"expected a head of ours, which can be made to serve, got {type(exit_.head).__name__}")
    if not isinstance(policy, PlannedPolicy):
        return replace(exit_, head=InferenceHead(exit_.head, 1.0))
    # The temperature is folded into the weights, so the head's logits are what the policy calls answers.
    return replace(exit_, head=InferenceHead(exit_.head, policy.temperature), policy=policy.on_answers(),
                   answer=_as_it_is)


def _as_it_is(scores: Tensor) -> Tensor:
    return scores


def _tables(inputs: Tensor, truth: Tensor, layers: Sequence[CandidateLayer], stages: Sequence[Stage], full: Tensor,
            heads: Sequence[float]) -> dict[str, Any]:
    """Return the columns beyond single numbers, which only exits with confidence thresholds have."""
    policies = [stage.exit.policy for stage in stages if stage.exit is not None]
    thresholds = [policy.threshold for policy in policies if isinstance(policy, ConfidencePolicy)]
    if not policies or len(thresholds) < len(policies):
        return {}
    with torch.no_grad():
        answers = [run_with_exits((batch,), stages, anytime=torch.ones(len(batch), dtype=torch.bool))
                   for batch in inputs.split(BATCH)]
    return tables(judgement(answers, full, truth, layers, heads), layers, thresholds)


def _auc(scores: Tensor, truth: Tensor) -> float:
    """Return the probability that a positive ranks above a negative. Ties count half: it is the Mann-Whitney statistic.

    Args:
        scores: the logits, (N, 2).
        truth: the true classes, 0 or 1, (N,).
    """
    ranks = torch.from_numpy(rankdata((scores[:, 1] - scores[:, 0]).numpy()))
    n_positive = int(truth.sum())
    above = ranks[truth == 1].sum().item() - n_positive * (n_positive + 1) / 2
    return above / (n_positive * (len(truth) - n_positive))


def time_ratios(inputs: Tensor, plain: Callable[[Tensor], object], stages: Sequence[Stage]) -> dict[str, float]:
    """Return the CPU time with exits / that of the plain backbone, by batch size, with one thread and interleaved."""
    def exiting(batch: Tensor) -> Answers:
        return run_with_exits((batch,), stages)

    with one_thread(), torch.no_grad():
        seconds = {size: interleaved({"plain": plain, "exiting": exiting}, inputs.split(size)) for size in SIZES}
    return {str(size): ratio_of_sums(of["exiting"], of["plain"]) for size, of in seconds.items()}


def _flops_ratio(taken: Tensor, costs: Sequence[float], heads: Sequence[float]) -> float:
    spent = torch.ones(len(taken), dtype=torch.float64)
    on_heads = torch.zeros(len(taken), dtype=torch.float64)
    for number, (cost, head) in enumerate(zip(costs, heads)):
        on_heads[(taken >= number) | (taken == FULL)] += head
        spent[taken == number] = cost
    return (spent + on_heads).mean().item()


def _flops(exit_: Exit, shape: tuple[int, ...]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        exit_.policy(exit_.head(torch.zeros(1, *shape)))
    return int(counter.get_total_flops())


def _parameters(exit_: Exit) -> list[nn.Parameter]:
    modules = [part for part in (exit_.head, exit_.policy) if isinstance(part, nn.Module)]
    return [parameter for module in modules for parameter in module.parameters()]
