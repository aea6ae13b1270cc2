"""Rows that are read from a file are compared with rows in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from early_exit.handler.errors import RecordError
from early_exit.training.data.activation_file import Activations, Selected


@settings(max_examples=60)
@given(rows=st.lists(st.integers(0, 19), max_size=30))
def test_any_rows_are_read_in_the_order_asked_for(rows: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    values, file = _stored(tmp_path_factory)
    assert torch.equal(file[torch.tensor(rows, dtype=torch.int64)], values[torch.tensor(rows, dtype=torch.int64)])


def test_what_is_written_in_pieces_is_read_after_opening_again(tmp_path: Path) -> None:
    values = torch.randn(10, 3, 2).half()
    file = Activations.create(tmp_path / "rows.npy", 10, (3, 2))
    file.write(4, values[4:])
    file.write(0, values[:4])
    file.flush()
    assert torch.equal(Activations(tmp_path / "rows.npy")[torch.arange(10)], values)


def test_what_float16_cannot_hold_is_noticed(tmp_path: Path) -> None:
    values = torch.randn(10, 3)
    file = Activations.create(tmp_path / "rows.npy", 10, (3,))
    file.write(0, values.half())
    file.flush()
    assert file.finite_rows().all()
    values[7, 1] = 70_000.0
    file.write(0, values.half())
    file.flush()
    assert not file.finite_rows().all()


def test_a_file_that_was_cut_short_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    Activations.create(path, 10, (3,)).flush()
    opened = Activations(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RecordError, match=r"ends before row 9: delete the run's folder"):
        opened[torch.arange(10)]
    with pytest.raises(RecordError, match=r"rows.npy: .*Delete the run's folder and train again"):
        Activations(path)


@pytest.mark.parametrize("shape", [(0, 3), (5,)])
def test_no_rows_and_rows_without_a_shape_are_read(shape: tuple[int, ...], tmp_path: Path) -> None:
    file = Activations.create(tmp_path / "rows.npy", shape[0], shape[1:])
    assert len(file) == shape[0]
    assert file[torch.arange(shape[0])].shape == shape


def test_selected_rows_count_from_zero(tmp_path: Path) -> None:
    file = Activations.create(tmp_path / "rows.npy", 5, (1,))
    file.write(0, torch.arange(5.0)[:, None].half())
    file.flush()
    chosen = Selected(file, torch.tensor([4, 2]))
    assert len(chosen) == 2
    assert chosen[torch.tensor([1, 0])].flatten().tolist() == [2.0, 4.0]


def _stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, Activations]:
    folder = tmp_path_factory.mktemp("rows")
    values = torch.randn(20, 4, 3).half()
    file = Activations.create(folder / "rows.npy", 20, (4, 3))
    file.write(0, values)
    file.flush()
    return values, file
