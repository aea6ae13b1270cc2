"""A handler that loads several models keeps each of them: only the one that was exported is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from early_exit.handler.user_handler.wrapper import given_to_loaders
from tests.archiver.test_tryout import HANDLER, PLAIN, archived, samples

__all__ = ["samples"]

FOR_LARGE_ROWS = "return (self.second if x[0, 0] > 7 else self.model)(x)"
"""The samples have small rows, so no sample shows the second model."""


@pytest.mark.parametrize("load", [
    "self._load_pickled_model(folder, 'net.py', os.path.join(folder, 'weights.pth'))",
    "self._load_torchscript_model(os.path.join(folder, 'second.pt'))",
])
def test_of_a_handler_that_loads_two_models_the_other_one_stays_its_own(
        load: str, tmp_path: Path, samples: list[Path]) -> None:
    save = "        torch.jit.script(torch.nn.Linear(4, 3)).save(os.path.join(folder, 'second.pt'))\n"
    made = archived(tmp_path, HANDLER.format(
        initialize=f"        folder = context.system_properties['model_dir']\n{save}        self.second = {load}",
        postprocess=PLAIN).replace("return self.model(x)", FOR_LARGE_ROWS), samples)
    assert made["handler"]["loading"] == "own", "given ours for each of its models, it would answer with a wrong one"
    assert "weights.pth" in made["names"]


def test_what_a_handler_loads_after_initialize_is_its_own() -> None:
    class Lazy:
        def _load_pickled_model(self) -> str:
            return "its own"

    handler, ours = Lazy(), torch.nn.Identity()
    with given_to_loaders(handler, lambda: ours):
        assert handler._load_pickled_model() is ours  # type: ignore[comparison-overlap]
    assert handler._load_pickled_model() == "its own"
