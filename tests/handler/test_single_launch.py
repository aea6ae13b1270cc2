"""A batch that is launched at once gets the same answers as stage by stage. All tests but that of the compiler need a
GPU."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from early_exit.handler.cuda.executor import GraphedExecutor, plain_executor
from early_exit.handler.cuda.kernels import compiled
from early_exit.handler.cuda.stages import capture_stages, graphed
from early_exit.handler.exits.policy import ConfidencePolicy
from early_exit.handler.inference.executor import Executor, Record
from early_exit.handler.inference.forward import Answers, Exit, Live, Stage, run_with_exits
from early_exit.handler.protocol import FULL
from tests.handler.test_cuda_graphs import CUDA, SIZES, stages, varied
from tests.handler.test_cuda_graphs import _full_precision as _full_precision
from tests.support.skips import needs_cuda_build, needs_gpu


def prepared(*levels: list[Stage], batch_size: int = 16, record: Record | None = None) -> Executor:
    fast = graphed(levels[0], CUDA)
    executor = plain_executor([fast, *(
        tuple(replace(stage, exit=other.exit and replace(stage.exit, policy=other.exit.policy))
              for stage, other in zip(fast, level)) for level in levels[1:])], record)
    assert isinstance(executor, GraphedExecutor)
    return ready(executor, fast, (varied(1),), batch_size)


def ready(executor: Executor, fast: Sequence[Stage], first: Live, batch_size: int) -> Executor:
    capture_stages(fast, first, batch_size)
    executor.prepare(first, batch_size)
    return executor


def run(executor: Executor, level: int, inputs: Live, shadow: Tensor) -> Answers:
    return executor.run(inputs, level, shadow).answers


def assert_same(found: Answers, expected: Answers) -> None:
    assert found.stages.tolist() == expected.stages.tolist()
    assert found.shadow.tolist() == expected.shadow.tolist()
    torch.testing.assert_close((found.outputs, found.reference), (expected.outputs, expected.reference), rtol=1e-3,
                               atol=1e-3)


@needs_cuda_build
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90", "sm_100"])
def test_the_kernels_compile(architecture: str) -> None:
    assert compiled(architecture).startswith(b"\x7fELF")


@needs_gpu
@pytest.mark.parametrize("exits", [{0, 1}, {1}, {0}])
@pytest.mark.parametrize(("shrink_from", "sizes"), [(1, SIZES), (3, SIZES), (99, SIZES), (1, (130, 33, 64, 100, 129))])
def test_launched_at_once_batches_of_every_size_get_the_same_answers(
        shrink_from: int, sizes: tuple[int, ...], exits: set[int]) -> None:
    plain = stages(CUDA, shrink_from)
    plain = [one if number in exits else replace(one, exit=None) for number, one in enumerate(plain)]
    executor, kept = prepared(plain, batch_size=max(sizes)), []
    for size in [*sizes, *sizes]:
        x, shadow = varied(size), torch.rand(size) < 0.3
        expected = run_with_exits((x.clone(),), plain, shadow=shadow)
        found = run(executor, 0, (x,), shadow)
        assert not size or not found.stage_seconds, "launched stage by stage"
        kept.append((found, expected))
    for found, expected in kept:  # compared last: later batches must not change what was returned
        assert_same(found, expected)
    assert {stage for found, _ in kept for stage in found.stages.tolist()} == {*exits, FULL}


@needs_gpu
def test_a_batch_that_leaves_whole_and_one_that_stays_whole_are_answered() -> None:
    everybody, nobody = stages(CUDA), stages(CUDA)
    everybody[0] = replace(everybody[0], exit=replace(everybody[0].exit, policy=ConfidencePolicy(1.0, 0.0)))
    for number in (0, 1):
        nobody[number] = replace(nobody[number], exit=replace(nobody[number].exit, policy=ConfidencePolicy(1.0, 2.0)))
    x, no_shadow = varied(7), torch.zeros(7, dtype=torch.bool)
    for given, left in ((everybody, 0), (nobody, FULL)):
        found = run(prepared(given), 0, (x,), no_shadow)
        assert found.stages.tolist() == [left] * 7
        assert_same(found, run_with_exits((x,), given))
    assert_same(run(prepared(everybody), 0, (x,), ~no_shadow), run_with_exits((x,), everybody, shadow=~no_shadow))


@needs_gpu
def test_settings_differ_in_who_leaves_and_the_last_has_no_exits() -> None:
    first, safer, off = stages(CUDA), stages(CUDA), [replace(one, exit=None) for one in stages(CUDA)]
    for number in (0, 1):
        safer[number] = replace(safer[number], exit=replace(safer[number].exit, policy=ConfidencePolicy(0.2, 0.9)))
    executor = prepared(first, safer, off)
    for size in (1, 7, 16):
        x, shadow = varied(size), torch.rand(size) < 0.3
        for step, plain in enumerate((first, safer, off)):
            found = run(executor, step, (x,), shadow)
            assert not found.stage_seconds
            assert_same(found, run_with_exits((x,), plain, shadow=shadow))


@needs_gpu
def test_all_that_travels_keeps_its_rows_and_types() -> None:
    def first(x: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        maps = torch.stack((x, -x, x + 1), dim=1).unsqueeze(-1).contiguous(memory_format=torch.channels_last)
        return maps, number, number > 2, maps.bfloat16()[:, :1, :1]

    def last(maps: Tensor, number: Tensor, is_large: Tensor, half: Tensor) -> tuple[Tensor, ...]:
        return (torch.stack((maps.sum(dim=(1, 2, 3)), number.float(), is_large.float(), half.flatten(1)[:, 0]), dim=1),)

    given = [Stage(first, Exit(lambda maps: maps[:, 0, :4, 0], ConfidencePolicy(1.0, 0.5), lambda logits: logits)),
             Stage(last)]
    fast = graphed(given, CUDA)
    first_row = torch.zeros(1, 6, device=CUDA), torch.zeros(1, dtype=torch.int64, device=CUDA)
    executor = ready(plain_executor([fast]), fast, first_row, 24)
    for size in (1, 5, 24):
        inputs = 2 * torch.randn(size, 6, device=CUDA), torch.arange(size, device=CUDA)
        found = run(executor, 0, inputs, torch.arange(size) % 5 == 4)
        assert not found.stage_seconds
        assert_same(found, run_with_exits(inputs, given, shadow=torch.arange(size) % 5 == 4))


@needs_gpu
@pytest.mark.parametrize("reason", ["the policy waits for the GPU", "a larger batch"])
def test_what_cannot_be_launched_at_once_goes_stage_by_stage(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    given = stages(CUDA)
    if reason == "the policy waits for the GPU":
        decide = given[0].exit.policy
        given[0] = replace(given[0], exit=replace(
            given[0].exit, policy=lambda logits: decide(logits) & (float(logits.sum()) < 1e9)))
    executor = prepared(given, batch_size=4 if reason == "a larger batch" else 16)
    for size in (7, 16):
        x, shadow = varied(size), torch.rand(size) < 0.3
        found = run(executor, 0, (x,), shadow)
        assert found.stage_seconds
        assert_same(found, run_with_exits((x,), given, shadow=shadow))
    assert ("cannot decide itself" in caplog.text) == (reason != "a larger batch")
    assert torch.rand(5, device=CUDA).unique().numel() == 5, "torch is not usable any more"


@needs_gpu
def test_batches_that_came_before_the_graphs_were_made_do_not_mix_up_what_stages_read(
        caplog: pytest.LogCaptureFixture) -> None:
    plain = stages(CUDA)
    fast = graphed(stages(CUDA), CUDA)
    executor = plain_executor([fast])
    for _ in range(5):  # these batches shrink to a few rows
        run(executor, 0, (varied(8),), torch.arange(8) < 2)
    ready(executor, fast, (varied(1),), 8)
    for size in (1, 2, 3, 5, 8):
        x, shadow = varied(size), torch.rand(size) < 0.3
        assert_same(run(executor, 0, (x,), shadow), run_with_exits((x,), plain, shadow=shadow))
    assert "captured before the one that it follows" in caplog.text


@needs_gpu
def test_observed_batches_show_the_shadow_rows_and_others_are_launched_at_once() -> None:
    plain, seen = stages(CUDA), {}
    executor = prepared(stages(CUDA), record=lambda number, x: seen.setdefault(number, x.clone()))
    x, shadow = varied(9), torch.arange(9) % 2 == 0
    also_seen: dict[int, Tensor] = {}
    assert_same(run(executor, 0, (x,), shadow),
                run_with_exits((x,), plain, shadow=shadow, observe=also_seen.__setitem__))
    torch.testing.assert_close(seen, also_seen, rtol=1e-3, atol=1e-3)
    assert not run(executor, 0, (x,), ~shadow & shadow).stage_seconds


@needs_gpu
def test_a_pass_that_was_made_in_inference_mode_serves_outside_of_it() -> None:
    with torch.inference_mode():
        executor = prepared(stages(CUDA))
        x, shadow = varied(4), torch.zeros(4, dtype=torch.bool)
        inside = run(executor, 0, (x,), shadow).outputs.clone()
    with torch.no_grad():
        torch.testing.assert_close(run(executor, 0, (x + 0,), shadow).outputs, inside)
