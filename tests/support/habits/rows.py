"""Habits around a small model of rows: how it is loaded, called and wrapped, and how handlers treat their batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.habits.habit import CONFIG, Ask, Habit, UsersFiles, made

JSON = "application/json"
MAGNITUDES = (4.0, 0.05, 3.0, 0.1, 0.5, 6.0, 0.02, 1.0)
"""The magnitudes of the rows. Small rows give answers with a low confidence, and large ones with a high confidence."""
ROWS = torch.randn(len(MAGNITUDES), 6, generator=torch.Generator().manual_seed(5)) * torch.tensor(MAGNITUDES)[:, None]


def rows_net(model_file: str = "rows_net.py", inputs: Tensor | None = None) -> nn.Module:
    """Return the model of a file, scaled so that its scores for inputs of magnitude 1 differ clearly."""
    example = torch.randn(64, 6, generator=torch.Generator().manual_seed(6)) if inputs is None else inputs
    return made(model_file, example)


def asks(rows: Tensor = ROWS, **more: Any) -> tuple[Ask, ...]:
    """Return requests with one row each. Every second one declares JSON, and the others are bytes."""
    bodies = [json.dumps([round(value, 4) for value in row]).encode() for row in rows.tolist()]
    return tuple(Ask(body, JSON if number % 2 else "", **more) for number, body in enumerate(bodies))


def followers(model: Any) -> Sequence[Sequence[nn.Linear]]:
    return [[model.second[0], model.last], [model.last]]


def masked_followers(score: float, model: Any) -> Sequence[Sequence[nn.Linear]]:
    """Return the layers that follow each exit of a model with a masked class, to which the last layer gives `score`."""
    last = nn.Linear(24, 3)
    last.load_state_dict(model.last.state_dict())
    with torch.no_grad():
        last.weight[1], last.bias[1] = 0.0, score
    return [[model.second[0], last], [last]]


def rows(name: str, handler: str = "rows_handler.py", *, model_file: str | None = "rows_net.py",
         also: Sequence[str] = (), **more: Any) -> Habit:
    """Return a habit around a model of rows."""
    needed = {"rows_handler.py", "rows_net.py", *also} - {model_file, handler}
    return Habit(name=name, handler=handler, model_file=model_file, imports=tuple(sorted(needed)),
                 **{"model": partial(rows_net, model_file or "rows_net.py"), "asks": asks(), "followers": followers,
                    **more})


def renamed(prefix: str) -> Callable[[nn.Module, Path], UsersFiles]:
    """Return a function that writes weights whose names begin with a prefix."""
    def write(model: nn.Module, folder: Path) -> UsersFiles:
        torch.save({prefix + name: tensor for name, tensor in model.state_dict().items()}, folder / "weights.pth")
        return UsersFiles(folder / "weights.pth")
    return write


def checkpoint(model: nn.Module, folder: Path) -> UsersFiles:
    torch.save({"epoch": 3, "arguments": SimpleNamespace(name="rows"), "state_dict": model.state_dict(),
                "optimizer": torch.optim.SGD(model.parameters(), 0.1).state_dict()}, folder / "checkpoint.pth")
    return UsersFiles(folder / "checkpoint.pth")


def whole_module(model: nn.Module, folder: Path) -> UsersFiles:
    torch.save(model, folder / "model.pth")
    return UsersFiles(folder / "model.pth")


def averaged(model: nn.Module, folder: Path) -> UsersFiles:
    """Write other weights as the serialized file, and the weights that the handler uses next to it."""
    torch.save({name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}, folder / "weights.pth")
    torch.save(model.state_dict(), folder / "ema.pth")
    return UsersFiles(folder / "weights.pth", (folder / "ema.pth",))


def with_file(name: str, content: bytes) -> Callable[[nn.Module, Path], UsersFiles]:
    """Return a function that writes the weights and another file."""
    def write(model: nn.Module, folder: Path) -> UsersFiles:
        torch.save(model.state_dict(), folder / "weights.pth")
        (folder / name).write_bytes(content)
        return UsersFiles(folder / "weights.pth", (folder / name,))
    return write


def exported(model: nn.Module, folder: Path) -> UsersFiles:
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(torch.export.export(model, (torch.zeros(2, 6),), dynamic_shapes=({0: batch},)),
                      folder / "model.pt2")
    return UsersFiles(folder / "model.pt2")


POSITIVE = torch.exp(ROWS.clamp(-4, 4))
SPREAD = torch.exp(torch.randn(64, 6, generator=torch.Generator().manual_seed(7)))
SCALE = {"mean": [0.1, -0.2, 0.3, 0.0, 0.2, -0.1], "deviation": [1.0, 1.2, 0.8, 1.1, 0.9, 1.0]}
LABELS = {str(number): name for number, name in enumerate(("Käse", "Süßholz", "Öl"))}
OBJECTS = tuple(Ask(json.dumps(dict(zip("abcdef", row))).encode(), JSON if number % 2 else "")
                for number, row in enumerate(ROWS.round(decimals=3).tolist()))
TEXTS = tuple(Ask(text.encode(), "text/plain" if number % 2 else "") for number, text in enumerate((
    "aaaaaaaaaaaaaaaaeeeeeeeeeeeeeeeeennnnn", "x", "Un oiseau bleu, un oiseau noir, un oiseau blanc", "hm",
    "i think it is in time", "pst", "oooo uuuu oooo uuuu oooo uuuu", "e")))

LOADED = (
    rows("plain"),
    rows("averaged_weights", "averaged_weights.py", write=averaged),
    rows("module_prefix", "unprefixed.py", model_file=None, write=renamed("module.")),
    rows("nested_checkpoint", "nested_checkpoint.py", model_file=None, write=checkpoint),
    rows("compiled_checkpoint", "compiled_checkpoint.py", write=renamed("_orig_mod.")),
    rows("whole_module", "whole_module.py", model_file=None, write=whole_module),
    rows("exported_program", "exported_program.py", model_file=None, write=exported),
    rows("tar_gz", archive_format="tgz"),
    rows("folder", archive_format="no-archive"),
    rows("marked_configuration", config="\ufeff# Prüfung\n" + CONFIG),
    rows("dated_version", version="2024-05-01", options={"version": "2024-05-02"}),
    rows("infinite_version", version="inf", options={"version": "inf-2"}),
    rows("lazy", "lazy.py"),
)
WRAPPED = (
    rows("softmax_wrapper", "softmax_wrapper.py"),
    rows("scaled_in_front", "scaled_in_front.py", also=("scaling.py",),
         write=with_file("statistics.json", json.dumps(SCALE).encode())),
    rows("normalised_inside", model_file="normalised_net.py"),
    rows("compiled", "compiled.py"),
    rows("compiled_by_configuration", config=CONFIG + "pt2:\n  compile:\n    enable: true\n    backend: eager\n"),
    rows("data_parallel", "data_parallel.py"),
    rows("warmed_up", "warmed_up.py"),
)
CALLED = (
    rows("service_object", "service_object.py", model_file=None, also=("rows_service.py",)),
    rows("global_model", "global_model.py", model_file=None),
    rows("function_beside_class", "function_beside_class.py"),
    rows("named_function", "named_function.py:answer", model_file=None, also=("rows_service.py",)),
    rows("inner_module", "inner_module.py"),
    rows("hooked", "hooked.py"),
    rows("parameters_device", "parameters_device.py"),
    rows("model_device", "model_device.py", model_file="device_net.py"),
    rows("model_config", "model_config.py", model_file="config_net.py"),
    rows("predict_method", "predict_method.py", model_file="predicting_net.py"),
    rows("direct_forward", "direct_forward.py"),
    rows("net_attribute", "net_attribute.py", model_file=None),
    rows("models_by_name", "models_by_name.py", model_file=None),
    rows("explained", "explained.py", asks=(*asks(), *asks(ROWS[:3], explain=True))),
)
BATCHED = (
    rows("reversed_batch", "reversed_batch.py"),
    rows("sorted_batch", "sorted_batch.py"),
    rows("distinct_rows", "distinct_rows.py", asks=(*asks(), *asks(ROWS[:2]))),
    rows("augmented_rows", "augmented_rows.py"),
    rows("augmented_calls", "augmented_calls.py"),
    rows("one_by_one", "one_by_one.py"),
)
ANSWERED = (
    rows("noisy", "noisy.py"),
    rows("objects_in", "objects_in.py", asks=OBJECTS),
    rows("letters", "letters.py", asks=TEXTS),
    rows("latin_labels", "latin_labels.py",
         write=with_file("labels.txt", "\n".join(LABELS.values()).encode("latin-1"))),
    rows("marked_labels", "marked_labels.py", write=with_file("labels.json", json.dumps(LABELS).encode("utf-8-sig"))),
    rows("array_out", "array_out.py"),
    rows("picture_out", "picture_out.py"),
    rows("own_statuses", "own_statuses.py", asks=(*asks(), Ask(b"[1, 2]"), Ask(b"[1, 2, 3]", JSON))),
    rows("strict", "strict.py", asks=(*asks(), Ask(b"[1, 2]", fails=True), Ask(b"no json", fails=True))),
    rows("counted", "counted.py"),
)
COMPUTED = (
    rows("autocast", model_file="autocast_net.py"),
    rows("standardised_weights", model_file="standardised_net.py", followers=lambda model: [[model.last]]),
    rows("distances", model_file="centres_net.py", thresholds=(0.999, 0.97)),
    rows("squeezed", "squeezed.py", model_file="squeezed_net.py"),
    rows("masked_with_infinity", model_file="masked_inf_net.py", followers=partial(masked_followers, float("-inf")),
         thresholds=(0.9, 0.69)),
    rows("masked_with_a_large_number", model_file="masked_large_net.py", followers=partial(masked_followers, -1e9),
         thresholds=(0.9, 0.69)),
    rows("named_head", "first_head.py", model_file="two_heads_net.py", options={"output": "colour"}),
    rows("logarithms", model_file="logarithm_net.py", model=partial(rows_net, "logarithm_net.py", SPREAD),
         asks=asks(POSITIVE), thresholds=(0.9, 0.75)),
)
