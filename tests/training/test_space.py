"""The search space: every choice of a tuner becomes a head that can be built, and errors name a user's mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.handler.backbone.pooling import pool_activation, pooled_shape
from early_exit.handler.errors import ConfigError
from early_exit.handler.exits.head import Convolution, Head, HeadSpec
from early_exit.training.heads.space import SearchSpace, given_head, spec_of, used

SHAPES = [(6, 8, 8), (6, 7, 7), (6, 1, 1), (5, 12), (20,)]


@settings(max_examples=150)
@given(data=st.data(), shape=st.sampled_from(SHAPES), recorded=st.sampled_from([1, 2, 4, 8, None]))
def test_every_choice_of_the_space_is_a_head_that_serves_as_it_was_trained(
        data: st.DataObject, shape: tuple[int, ...], recorded: int | None) -> None:
    choices = SearchSpace().choices(shape, recorded)
    parameters = {name: data.draw(st.sampled_from(choice["_value"])) for name, choice in choices.items()}
    spec = spec_of(parameters, shape, recorded)
    head = Head(spec, shape, 3).eval()
    raw = torch.randn(2, *shape)
    as_trained = head.classify(spec.reads(pool_activation(raw, recorded)))
    torch.testing.assert_close(head(raw), as_trained, atol=1e-5, rtol=1e-5)
    assert HeadSpec.from_json(spec.to_json()) == spec


@settings(max_examples=150)
@given(data=st.data(), shape=st.sampled_from(SHAPES))
def test_choices_are_the_same_head_exactly_when_what_shows_of_them_is(
        data: st.DataObject, shape: tuple[int, ...]) -> None:
    choices = SearchSpace(channels=(32,), width=(64,), linears=(0, 1)).choices(shape, 8)
    one, other = ({name: data.draw(st.sampled_from(choice["_value"])) for name, choice in choices.items()}
                  for _ in range(2))
    assert (used(one) == used(other)) == (spec_of(one, shape, 8) == spec_of(other, shape, 8))


@given(shape=st.sampled_from(SHAPES), recorded=st.sampled_from([1, 2, 4, 8, None]))
def test_no_two_sides_mean_the_same(shape: tuple[int, ...], recorded: int | None) -> None:
    choices = SearchSpace().choices(shape, recorded)
    if "pool" not in choices:
        return
    heads = [spec_of({"pool": pool, "convolutions": 0, "linears": 0}, shape, recorded)
             for pool in choices["pool"]["_value"]]
    read = [pooled_shape(pooled_shape(shape, recorded), head.pool) for head in heads]
    assert len(set(read)) == len(read)


@pytest.mark.parametrize(("text", "message"), [
    ("widht: [3]", "did you mean 'width'"), ("kernel: [2]", "2 is not a possible value for kernel"),
    ("convolutions: [3]", "3 is not a possible value for convolutions"), ("pool: []", "needs a list"),
    ("pool: 4", "needs a list"),
    ("separable: [1]", "1 is not a possible value for separable"), ("- 3", "expected keys and values"),
    ("heads: {layer1: {pool: 4, widhts: [3], widths: yes}}", "expected a head with"), ("a: [", "cannot read"),
])
def test_a_mistake_in_the_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        SearchSpace.load(path)


def test_a_file_overrides_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("width: [512]\n"
                    "heads:\n  layer1: {pool: raw, convolutions: [{kernel: 3, stride: 2, channels: 8}]}\n")
    space = SearchSpace.load(path)
    assert space.width == (512,)
    assert space.kernel == SearchSpace().kernel
    assert space.heads == {"layer1": HeadSpec(None, (Convolution(3, 2, 8),), ())}


def test_a_users_head_cannot_read_more_than_was_recorded() -> None:
    assert given_head(HeadSpec(None), 4) == HeadSpec(4, recorded=4)
    with pytest.raises(ConfigError, match="pooled to 4: set early_exit.pool"):
        given_head(HeadSpec(8), 4)


def test_the_space_is_as_wide_as_its_largest_head() -> None:
    def names(**settings: Any) -> set[str]:
        return set(SearchSpace(**settings).choices((4, 8, 8), 4))

    assert "kernel2" not in names(convolutions=(0, 1))
    assert "width2" in names(linears=(0, 2)) and "width2" not in names(linears=(1,))
