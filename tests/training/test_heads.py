"""Distillation and calibration of one exit head."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from early_exit.handler.exits.head import Convolution, HeadSpec
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.training.costs.cost import head_flops
from early_exit.training.heads.distill import Classify, Distillation, train_head
from early_exit.training.selection.calibrate import MIN_TEMPERATURE, fit_temperature

RECIPE = Distillation(epochs=30)


def recorded(n_records: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return activations that are far from standardised, and a teacher whose logits are a linear function of them."""
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(n_records, 6, 4, 4, generator=generator) * 5 + 20
    direction = torch.randn(6 * 16, 3, generator=generator)
    return pooled, (((pooled - 20) / 5).flatten(1) @ direction / 4).log_softmax(1)


@pytest.mark.parametrize("spec", [
    HeadSpec(widths=()), HeadSpec(widths=(32,)), HeadSpec(widths=(32, 16)),
    HeadSpec(convolutions=(Convolution(3, 1, 16),), widths=()),
    HeadSpec(convolutions=(Convolution(3, 1, 48, True),), widths=())])
def test_a_head_learns_to_say_what_the_backbone_says(spec: HeadSpec) -> None:
    pooled, teacher = recorded(1200)
    head = train_head(spec, (6, 8, 8), pooled[:1000], teacher[:1000], RECIPE)
    agreement = (head(pooled[1000:]).argmax(1) == teacher[1000:].argmax(1)).double().mean()
    assert agreement > 0.7


@pytest.mark.parametrize("spec", [
    HeadSpec(widths=(8,)), HeadSpec(pool=2), HeadSpec(convolutions=(Convolution(3, 2, 8, True), Convolution(3, 1, 5)))])
def test_what_training_adds_is_folded_into_the_head(spec: HeadSpec) -> None:
    pooled, teacher = recorded(200)
    seen: list[torch.Tensor] = []

    def last_step(step: int, classify: Classify) -> bool:
        seen.append(classify(spec.reads(pooled)))
        return True

    head = train_head(spec, (6, 8, 8), pooled, teacher, Distillation(epochs=3), last_step)
    torch.testing.assert_close(head.classify(spec.reads(pooled)), seen[-1], atol=1e-3, rtol=1e-3)


def test_training_ends_when_it_is_told_to() -> None:
    pooled, teacher = recorded(300)
    steps: list[int] = []

    def until_third(step: int, classify: Classify) -> bool:
        steps.append(step)
        return step < 3

    train_head(HeadSpec(), (6, 8, 8), pooled, teacher, RECIPE, until_third)
    assert steps == [1, 2, 3]


def test_a_head_reads_raw_activations_as_it_read_their_records() -> None:
    raw = torch.randn(64, 6, 8, 8) * 3 + 7
    pooled = functional.adaptive_avg_pool2d(raw, 4)
    head = train_head(HeadSpec(widths=(8,)), (6, 8, 8), pooled, torch.randn(64, 3).log_softmax(1), RECIPE)
    torch.testing.assert_close(head(raw), head.classify(pooled), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", [
    HeadSpec(widths=()), HeadSpec(widths=(16,)), HeadSpec(convolutions=(Convolution(3, 1, 16),), widths=())])
@pytest.mark.parametrize("constant", [5000.0, 300.0, 20.0])
def test_what_float16_rounds_away_in_records_does_not_decide_in_service(spec: HeadSpec, constant: float) -> None:
    """A channel that is large and nearly constant, as of a transformer, is exactly constant in its records."""
    generator = torch.Generator().manual_seed(1)
    pooled, teacher = recorded(1000)
    nearly = torch.rand(1000, 1, 4, 4, generator=generator) - 0.5  # within half of the resolution, to either side
    served = torch.cat([pooled, constant * (1 + nearly * torch.finfo(torch.float16).eps * 0.49)], dim=1)
    held = served.half().float()
    assert held[:, 6].unique().tolist() == [constant]
    held[:, :6] = served[:, :6]
    head = train_head(spec, (7, 8, 8), held, teacher, Distillation(epochs=10))
    assert (head(served).argmax(1) == head(held).argmax(1)).double().mean() > 0.99


def test_the_same_seed_gives_the_same_head_and_leaves_the_global_generator_alone() -> None:
    pooled, teacher = recorded(100)
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    first = train_head(HeadSpec(widths=(8,)), (6, 8, 8), pooled, teacher, RECIPE)
    assert torch.equal(torch.rand(1), expected_next)
    other = train_head(HeadSpec(widths=(8,)), (6, 8, 8), pooled, teacher, RECIPE)
    assert torch.equal(first(pooled), other(pooled))


def test_a_constant_feature_does_not_break_training() -> None:
    pooled, teacher = recorded(64)
    pooled[:, 0] = 3.0
    head = train_head(HeadSpec(widths=()), (6, 8, 8), pooled, teacher, RECIPE)
    assert torch.isfinite(head(pooled)).all()


def test_the_fitted_temperature_is_the_best_of_a_fine_grid() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(500, 5, generator=generator) * 6
    teacher = torch.distributions.Categorical(logits=logits / 3).sample()
    fitted = fit_temperature(logits, teacher)
    grid = torch.logspace(math.log10(0.05), math.log10(20), 2000).tolist()
    best = min(grid, key=lambda t: functional.cross_entropy(logits.double() / t, teacher).item())
    assert fitted == pytest.approx(best, rel=0.01)


def test_a_head_that_always_agrees_gets_a_small_temperature_within_the_bounds() -> None:
    logits = functional.one_hot(torch.arange(30) % 3, 3).float() * 4
    fitted = fit_temperature(logits, torch.arange(30) % 3)
    assert MIN_TEMPERATURE <= fitted < 0.2
    assert torch.isfinite(ConfidencePolicy(fitted, 0.5).confidence(logits)).all()


def test_head_flops_are_two_per_weight() -> None:
    head = train_head(HeadSpec(widths=(8,)), (6, 8, 8), *recorded(16), Distillation(epochs=1))
    assert head_flops(head, (6, 4, 4)) == 2 * (96 * 8 + 8 * 3)
