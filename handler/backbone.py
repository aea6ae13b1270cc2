"""The user's classifier, exported: its program, candidate layers and identity, as stored in an archive."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from early_exit.handler.candidates import CandidateLayer, LeftOut, discover_layers
from early_exit.handler.errors import ArchiveError, GraphError
from early_exit.handler.export import backbone_graph, export_backbone
from early_exit.handler.scores import ScoreKind, score_kind

FORMAT = 1
PROGRAM_FILE = "backbone.pt2"
DESCRIPTION_FILE = "backbone.json"


@dataclass(frozen=True)
class BackboneDescription:
    """What is known of a backbone without loading it."""

    sha256: str
    """Identity of weights and operations; records and plans belong to exactly one."""
    input_shape: tuple[int, ...]
    """One item, without the batch dimension."""
    input_dtype: str
    """Name of the torch dtype, such as 'float32'."""
    n_classes: int
    scores: ScoreKind
    flops: int
    """Of one item, counting convolutions, matrix products and attention."""
    candidates: tuple[CandidateLayer, ...]
    left_out: tuple[LeftOut, ...]
    probe: tuple[float, ...]
    """(K,) scores for `probe_input`, computed where the archive was made."""

    def probe_input(self) -> Tensor:
        """Return a (1, ...) input that is the same on every machine."""
        dtype = getattr(torch, self.input_dtype)
        n_values = torch.Size(self.input_shape).numel()
        return torch.sin(torch.arange(n_values, dtype=torch.float64)).to(dtype).reshape(1, *self.input_shape)

    def layer(self, path: str) -> CandidateLayer:
        """Return the candidate of that module path.

        Raises:
            GraphError: there is none.
        """
        for layer in self.candidates:
            if layer.path == path:
                return layer
        names = ", ".join(layer.path for layer in self.candidates)
        raise GraphError(f"{path!r} is not a candidate layer of this backbone; it has {names}")

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1))

    @classmethod
    def load(cls, path: Path) -> BackboneDescription:
        """Read a description.

        Raises:
            ArchiveError: it is not one, or a newer version of this software wrote it.
        """
        data = json.loads(path.read_text())
        if data.get("format") != FORMAT:
            raise ArchiveError(f"{path} has format {data.get('format')!r}, this version reads {FORMAT}: "
                               "use the version of early-exit-torchserve that wrote it, or a newer one")
        return cls(
            sha256=data["sha256"], input_shape=tuple(data["input_shape"]), input_dtype=data["input_dtype"],
            n_classes=data["n_classes"], scores=ScoreKind(data["scores"]), flops=data["flops"],
            candidates=tuple(CandidateLayer.from_json(layer) for layer in data["candidates"]),
            left_out=tuple(LeftOut(**layer) for layer in data["left_out"]), probe=tuple(data["probe"]),
        )


@dataclass(frozen=True)
class Backbone:
    """An exported classifier and its description."""

    program: ExportedProgram
    graph: fx.GraphModule
    description: BackboneDescription

    @classmethod
    def from_module(cls, model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Backbone:
        """Export an eager classifier.

        Raises:
            GraphError: it cannot be exported, is no classifier, or offers no place for an exit.
        """
        return cls.from_program(export_backbone(model, input_shape, dtype))

    @classmethod
    def from_program(cls, program: ExportedProgram) -> Backbone:
        """Describe an exported classifier.

        Raises:
            GraphError: it is no classifier, or offers no place for an exit.
        """
        graph = backbone_graph(program)
        source = next(node for node in graph.graph.nodes if node.op == "placeholder").meta["val"]
        input_shape = tuple(int(size) for size in source.shape[1:])
        zeros = torch.zeros((1, *input_shape), dtype=source.dtype)
        candidates, left_out, flops = discover_layers(graph, zeros)
        draft = BackboneDescription(
            sha256=_identity(program, source), input_shape=input_shape,
            input_dtype=str(source.dtype).removeprefix("torch."), n_classes=0, scores=ScoreKind.LOGITS, flops=flops,
            candidates=tuple(candidates), left_out=tuple(left_out), probe=(),
        )
        with torch.no_grad():
            scores = graph(draft.probe_input())
        if scores.shape[1] < 2:
            raise GraphError("expected scores for at least 2 classes, found 1: is this a regression model?")
        if not candidates:
            reasons = "; ".join(f"{layer.path}: {layer.reason}" for layer in left_out)
            raise GraphError(f"no layer of this backbone can carry an exit ({reasons})")
        description = BackboneDescription(**{**draft.__dict__, "n_classes": scores.shape[1],
                                             "scores": score_kind(scores), "probe": tuple(scores[0].tolist())})
        return cls(program, graph, description)

    def save(self, folder: Path) -> None:
        """Write program and description into an existing folder."""
        # Neither the example input nor the source lines of the model's code (with the paths of the machine
        # that exported it) are needed to run the program.
        self.program.example_inputs = None
        for node in self.program.graph.nodes:
            node.meta.pop("stack_trace", None)
        torch.export.save(self.program, folder / PROGRAM_FILE)
        self.description.save(folder / DESCRIPTION_FILE)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Backbone:
        """Read what `save` wrote, onto a device.

        Raises:
            ArchiveError: the files are damaged or of a newer format.
        """
        description = BackboneDescription.load(folder / DESCRIPTION_FILE)
        program = load_program(folder / PROGRAM_FILE)
        if torch.device(device).type != "cpu":
            program = move_to_device_pass(program, torch.device(device))
        return cls(program, backbone_graph(program), description)


def load_program(path: Path) -> ExportedProgram:
    """Read a .pt2 file.

    Raises:
        ArchiveError: it is not an exported program that this torch can read.
    """
    _require_no_pickle(path)
    try:
        return torch.export.load(path)
    except Exception as error:  # torch raises many kinds for a damaged or newer file
        raise ArchiveError(f"{path.name} cannot be read as an exported program by torch {torch.__version__}: "
                           f"{type(error).__name__}: {error}") from error


def _require_no_pickle(path: Path) -> None:
    """Refuse a .pt2 with anything but tensors in it: torch would unpickle that, and so run any code.

    Raises:
        ArchiveError: it has, or it is no .pt2.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                content = archive.read(name) if name.endswith((".pt", "_config.json")) else b""
                if name.endswith(".pt") and content:
                    torch.load(io.BytesIO(content), weights_only=True)
                elif b'"use_pickle": true' in content:
                    raise ArchiveError(f"{path.name} holds the pickled entry {name}: save it with plain tensors")
    except (OSError, zipfile.BadZipFile) as error:
        raise ArchiveError(f"cannot read {path} as an exported program: {error}") from error
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ArchiveError(f"{path.name} holds more than tensors, and unpickling that could run any code: export it "
                           "with tensors as example inputs") from error


def _identity(program: ExportedProgram, source: Tensor) -> str:
    """Return a hash of everything that determines the answers: input, operations, weights and constants.

    The operations are hashed as torch prints them, so another version of torch may give another hash for
    the same model: records are then collected afresh, never mixed up.
    """
    digest = hashlib.sha256(f"{tuple(source.shape[1:])} {source.dtype} {program.graph}".encode())
    tensors = {**program.state_dict, **{k: v for k, v in program.constants.items() if isinstance(v, Tensor)}}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
