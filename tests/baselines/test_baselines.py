"""The baselines keep their loss budget on the rows that they choose with, and serve in the same loop as our exits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from early_exit.handler.backbone.candidates import CandidateLayer
from early_exit.handler.backbone.pooling import pool_activation
from early_exit.handler.inference.forward import Exit, Stage, run_with_exits
from early_exit.handler.protocol import FULL
from tests.benchmarks.baselines.branchynet import branchynet, entropy
from tests.benchmarks.baselines.earlyon import _means, earlyon
from tests.benchmarks.baselines.gati import gati
from tests.benchmarks.baselines.labelled import LabelledRecords

N_RECORDS, N_CLASSES = 1200, 3
METHODS = [branchynet, gati, earlyon]


@pytest.fixture(scope="module")
def records() -> LabelledRecords:
    """Return records of two layers and a backbone that seldom errs. The channel means of both layers tell the class;
    those of the second layer do so more clearly."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(N_CLASSES, (N_RECORDS,), generator=generator)
    means = torch.nn.functional.one_hot(labels, N_CLASSES).float()

    def layer(noise: float) -> torch.Tensor:
        clean = means + noise * torch.randn(N_RECORDS, N_CLASSES, generator=generator)
        return clean[:, :, None, None] + 0.1 * torch.randn(N_RECORDS, N_CLASSES, 4, 4, generator=generator)

    errs = torch.rand(N_RECORDS, generator=generator) < 0.02
    layers = tuple(CandidateLayer(path, path, (N_CLASSES, 4, 4), cost) for path, cost in (("one", 0.3), ("two", 0.6)))
    return LabelledRecords(layers, 4, {"one": layer(0.5), "two": layer(0.3)}, labels,
                           (labels + errs.long()) % N_CLASSES, N_CLASSES, torch.arange(0, 600),
                           torch.arange(600, N_RECORDS))


class Backbone(nn.Module):
    """A backbone that plays back recorded layers. Its inputs are row numbers."""

    def __init__(self, records: LabelledRecords) -> None:
        super().__init__()
        self.records = records

    def stages(self, exits: dict[str, Exit]) -> list[Stage]:
        one, two = self.records.pooled["one"], self.records.pooled["two"]
        both = torch.cat([one, two], dim=1)
        scores = nn.functional.one_hot(self.records.backbone_class, N_CLASSES).float()

        def first(exit_: Exit, half: slice) -> Exit:
            return Exit(lambda x: exit_.head(x[:, half]), exit_.policy, exit_.answer)

        halves = {"one": slice(0, N_CLASSES), "two": slice(N_CLASSES, 2 * N_CLASSES)}
        ends = {path: first(exit_, halves[path]) for path, exit_ in exits.items()}
        # The row number travels as one more channel, so that the last stage can look up the scores of the row.
        number = torch.arange(N_RECORDS).float()[:, None, None, None].expand(-1, 1, 4, 4)
        carried = torch.cat([both, number], dim=1)
        return [Stage(lambda rows: (carried[rows],), ends.get("one")), Stage(lambda x: (x,), ends.get("two")),
                Stage(lambda x: (scores[x[:, -1, 0, 0].long()],))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_loss", [0.0, 0.02, 0.1])
def test_the_accuracy_lost_on_the_rows_chosen_with_is_within_the_budget(
        method: Callable[[LabelledRecords, float], dict[str, Exit]], max_loss: float, records: LabelledRecords) -> None:
    exits = method(records, max_loss)
    rows = records.tune if method is branchynet else records.tune[1::2]
    with torch.no_grad():
        answers = run_with_exits((rows,), Backbone(records).stages(exits))
    labels = records.labels[rows]
    lost = ((records.backbone_class[rows] == labels).double().mean()
            - (answers.outputs.argmax(dim=1) == labels).double().mean())
    assert lost <= max_loss + 1e-9
    if max_loss == 0.1:
        assert (answers.stages != FULL).double().mean() > 0.3


@pytest.mark.parametrize("method", METHODS)
def test_the_same_records_give_the_same_exits(
        method: Callable[[LabelledRecords, float], dict[str, Exit]], records: LabelledRecords) -> None:
    one, other = method(records, 0.05), method(records, 0.05)
    assert list(one) == list(other)
    x = records.pooled["two"][:50]
    assert torch.equal(one["two"].policy(one["two"].head(x)), other["two"].policy(other["two"].head(x)))


@pytest.mark.parametrize("shape", [(N_CLASSES, 7, 6), (9, N_CLASSES), (N_CLASSES,)], ids=["maps", "tokens", "vectors"])
@pytest.mark.parametrize("method", METHODS)
def test_a_served_head_reads_what_it_was_trained_on(
        method: Callable[[LabelledRecords, float], dict[str, Exit]], shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(N_CLASSES, (400,), generator=generator)
    signal = nn.functional.one_hot(labels, N_CLASSES).float()
    signal = signal.view(-1, 1, N_CLASSES) if len(shape) == 2 else signal.view(-1, N_CLASSES, *(1 for _ in shape[1:]))
    raw = signal + 0.3 * torch.randn(400, *shape, generator=generator)
    recorded = pool_activation(raw, 4)
    records = LabelledRecords((CandidateLayer("one", "one", shape, 0.5),), 4, {"one": recorded}, labels, labels,
                              N_CLASSES, torch.arange(200), torch.arange(200, 400))
    head = method(records, 0.1)["one"].head
    pooled = head.pool(raw)  # type: ignore[attr-defined]
    if method is earlyon:  # it reads only the second of the two summaries of tokens
        torch.testing.assert_close(pooled[:, 1] if len(shape) == 2 else pooled.flatten(1), _means(recorded))
    else:
        torch.testing.assert_close(pooled, records.spec.reads(recorded))
    assert (head(raw).argmax(dim=1) == labels).double().mean() > 0.9


def test_the_entropy_of_a_uniform_distribution_is_the_logarithm_of_its_size() -> None:
    assert entropy(torch.zeros(1, 8)).item() == pytest.approx(torch.tensor(8.0).log().item())
