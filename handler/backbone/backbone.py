"""The user's classifier, exported: its program, candidate layers and identity, as stored in an archive."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from early_exit.handler.archive_layout import DESCRIPTION_FILE, PROBE_FILE, PROGRAM_FILE
from early_exit.handler.backbone.candidates import CandidateLayer, LeftOut, discover_layers
from early_exit.handler.backbone.detector_tails import save_tail, tail_parameters
from early_exit.handler.backbone.export import (
    backbone_graph,
    computed_in,
    export_backbone,
    prepare_program,
    scores_dtype,
)
from early_exit.handler.backbone.graph import index_limits, inputs_of
from early_exit.handler.backbone.image_class import DetectorSpec
from early_exit.handler.backbone.probe import probe_for, require_fixed_rows, require_same_alone
from early_exit.handler.backbone.program_file import load_program
from early_exit.handler.backbone.scores import ScoreKind, score_kind
from early_exit.handler.backbone.signature import InputSpec, OutputSpec, Parameters
from early_exit.handler.errors import ArchiveError, GraphError
from early_exit.handler.formats import BACKBONE


@dataclass(frozen=True)
class BackboneDescription:
    """The description of a backbone, which can be read without loading the backbone."""

    sha256: str
    """Identity of weights and operations; records and plans belong to exactly one backbone."""
    inputs: tuple[InputSpec, ...]
    """The inputs in the order of the program."""
    output: OutputSpec
    """The form of the output of the user's model."""
    n_classes: int
    scores: ScoreKind
    flops: int
    """The FLOPs of one item, counting convolutions, matrix products and attention."""
    candidates: tuple[CandidateLayer, ...]
    left_out: tuple[LeftOut, ...]
    probe: tuple[float, ...]
    """(K,) scores for the backbone's probe, computed on the machine that made the archive."""
    detector: DetectorSpec | None = None
    """The detector that the backbone is a part of, or None if the model is a classifier."""
    constants: Mapping[str, bool | int | float | str | None] = field(default_factory=dict)
    """Constant values that the handler passes to the model besides tensors, by the names of the model's parameters."""
    parameters: Parameters | None = None
    """The parameters of the user's model; None in files that do not name them."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one item of the first input, without the batch dimension."""
        return self.inputs[0].shape

    def layer(self, path: str) -> CandidateLayer:
        """Return the candidate layer with this module path.

        Raises:
            GraphError: there is no such candidate layer.
        """
        for layer in self.candidates:
            if layer.path == path:
                return layer
        names = ", ".join(layer.path for layer in self.candidates)
        raise GraphError(f"{path!r} is not a candidate layer of this backbone; it has {names}")

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(BACKBONE.stamped(asdict(self)), indent=1))

    @classmethod
    def load(cls, path: Path) -> BackboneDescription:
        """Read a description.

        Raises:
            FormatError: this version does not read its format.
            ArchiveError: the file cannot be read, or is not a description.
        """
        try:
            return cls.from_json(json.loads(path.read_text()), str(path))
        except (OSError, ValueError) as error:
            raise ArchiveError(f"cannot read the description of the backbone in {path}: {error}") from error

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: str) -> BackboneDescription:
        """Read the output of `save`; errors name the source.

        Raises:
            FormatError: this version does not read its format.
            ArchiveError: the data is not a description.
        """
        BACKBONE.require(data, source)
        try:
            return cls._from_fields(data)
        except (KeyError, TypeError, ValueError) as error:
            raise ArchiveError(f"{source} is not a complete description of a backbone: {error!r}") from error

    @classmethod
    def _from_fields(cls, data: Mapping[str, Any]) -> BackboneDescription:
        return cls(
            sha256=data["sha256"], output=OutputSpec(**data["output"]),
            inputs=tuple(InputSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in data["inputs"]),
            n_classes=data["n_classes"], scores=ScoreKind(data["scores"]), flops=data["flops"],
            candidates=tuple(CandidateLayer.from_json(layer) for layer in data["candidates"]),
            left_out=tuple(LeftOut(**layer) for layer in data["left_out"]), probe=tuple(data["probe"]),
            detector=DetectorSpec.from_json(data["detector"]) if data.get("detector") else None,
            constants=data.get("constants", {}),
            parameters=Parameters(**data["parameters"]) if data.get("parameters") else None,
        )


@dataclass(frozen=True)
class Backbone:
    """An exported classifier and its description."""

    program: ExportedProgram
    graph: fx.GraphModule
    description: BackboneDescription
    probe: tuple[Tensor, ...]
    """(1, ...) inputs, on the CPU. Every machine that loads the backbone tests it on them."""
    folder: Path | None = None
    """The folder from which the backbone was read, which may also hold files of an engine. None for a backbone that was
    never written."""

    @classmethod
    def from_module(cls, model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype = torch.float32,
                    detector: DetectorSpec | None = None, output: str | None = None) -> Backbone:
        """Export an eager classifier with one input.

        Raises:
            GraphError: the model cannot be exported, is not a classifier, or has no candidate layer.
        """
        name = Parameters.of(model.forward).name(0)
        spec = InputSpec(name or "x", tuple(input_shape), str(dtype).removeprefix("torch."))
        return cls.from_inputs(model, [spec], detector, output=output)

    @classmethod
    def from_inputs(cls, model: nn.Module, inputs: Sequence[InputSpec], detector: DetectorSpec | None = None,
                    constants: Mapping[str, Any] = MappingProxyType({}), output: str | None = None) -> Backbone:
        """Export an eager classifier with several inputs, which are given to it by name.

        Args:
            model: the classifier.
            inputs: the tensors that it takes.
            detector: the detector that it is a part of, if any.
            constants: constant values that it takes besides the tensors, by name.
            output: the name or index of the output with the scores; needed only if several outputs could be scores.

        Raises:
            GraphError: the model cannot be exported, is not a classifier, or has no candidate layer.
        """
        program, found = export_backbone(model, inputs, constants, output)
        names = [spec.name for spec in inputs]
        backbone = cls.from_program(program, names, found, detector, constants, Parameters.of(model.forward))
        if detector is None:
            require_same_alone(model, names, constants, output, backbone.graph, backbone.probe)
        return backbone

    @classmethod
    def from_program(cls, program: ExportedProgram, names: Sequence[str] = (),
                     output: OutputSpec = OutputSpec(),  # noqa: B008 - it is frozen
                     detector: DetectorSpec | None = None, constants: Mapping[str, Any] = MappingProxyType({}),
                     parameters: Parameters | None = None) -> Backbone:
        """Describe an exported classifier.

        Args:
            program: maps (B, ...) inputs to (B, K) scores.
            names: names of the inputs; by default the names in the program.
            output: the form of the output of the user's model.
            detector: the detector that it is a part of, if any.
            constants: constant values that the user's model takes besides the inputs.
            parameters: the parameters of the user's model; by default the inputs.

        Raises:
            GraphError: the program is not a classifier, or has no candidate layer.
        """
        prepare_program(program)
        graph = backbone_graph(program)
        limits = index_limits(graph)
        nodes = inputs_of(graph.graph)
        inputs = tuple(
            InputSpec(name, tuple(int(size) for size in node.meta["val"].shape[1:]),
                      str(node.meta["val"].dtype).removeprefix("torch."), limits.get(node.name))
            for node, name in zip(nodes, names or [node.name for node in nodes]))
        probe = probe_for(graph, inputs)
        try:
            candidates, left_out, flops = discover_layers(graph, probe)
        except (RuntimeError, IndexError) as error:  # for example, the model needs a token that not every text contains
            raise GraphError(f"the exported backbone cannot run on a probe, so its answer depends on the values of an "
                             f"input in a way that an export cannot follow: {error}") from error
        draft = BackboneDescription(
            sha256=_identity(program, inputs), inputs=inputs,
            output=replace(output, dtype=scores_dtype(program)), n_classes=0, scores=ScoreKind.LOGITS,
            flops=flops, candidates=tuple(candidates), left_out=tuple(left_out), probe=(),
            detector=detector, constants=dict(constants),
            parameters=parameters or Parameters(tuple(spec.name for spec in inputs)),
        )
        with torch.no_grad():
            scores = graph(*probe)
        if scores.dim() != 2 or len(scores) != 1:
            raise GraphError(f"expected (1, classes) scores for a batch of one, found {tuple(scores.shape)}: the model "
                             "treats a batch of one differently, and answers must not depend on the batch")
        if detector is None:  # for a detector, two images of noise may differ in what rounding decides
            require_fixed_rows(graph, probe)
        if scores.shape[1] < 2:
            raise GraphError("expected scores for at least 2 classes, found 1: a regression has no class for an exit "
                             "to answer with; a binary classifier must return two scores")
        if not candidates:
            reasons = "; ".join(f"{layer.path}: {layer.reason}" for layer in left_out)
            raise GraphError(f"no layer of this backbone can carry an exit ({reasons})")
        description = replace(draft, n_classes=scores.shape[1], probe=tuple(scores[0].tolist()),
                              scores=score_kind(scores, computed_in(graph.graph)))
        return cls(program, graph, description, probe)

    def probed_by(self, inputs: tuple[Tensor, ...]) -> Backbone:
        """Return this backbone with other (1, ...) inputs as the probe, such as those of a real request."""
        with torch.no_grad():
            scores = self.graph(*inputs)
        description = replace(self.description, probe=tuple(scores[0].tolist()),
                              scores=score_kind(scores, computed_in(self.graph.graph)))
        return replace(self, description=description, probe=inputs)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next((parameter.device for parameter in self.graph.parameters()), torch.device("cpu"))

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters, including those of a detector's tail, which the graph calls."""
        return [*self.graph.parameters(), *tail_parameters(self.description.detector)]

    def save(self, folder: Path) -> None:
        """Write program and description into an existing folder."""
        # Neither the example input nor the source lines of the model's code (with the paths of the machine
        # that exported it) are needed to run the program.
        self.program.example_inputs = None
        for node in self.program.graph.nodes:
            node.meta.pop("stack_trace", None)
        torch.export.save(self.program, folder / PROGRAM_FILE)
        self.description.save(folder / DESCRIPTION_FILE)
        inputs = {str(number): tensor.contiguous() for number, tensor in enumerate(self.probe)}
        save_file(inputs, folder / PROBE_FILE)
        if self.description.detector is not None:
            save_tail(self.description.detector, folder)

    @classmethod
    def read_program(cls, folder: Path, description: BackboneDescription,
                     device: torch.device | str = "cpu") -> Backbone:
        """Read the program that `save` wrote beside a description, and move it to a device.

        Operations that the program calls must be registered before: `load_backbone` in `detection/` does so.

        Raises:
            ArchiveError: the file is damaged.
        """
        program = load_program(folder / PROGRAM_FILE)
        if torch.device(device).type != "cpu":
            program = move_to_device_pass(program, torch.device(device))
        return cls(program, backbone_graph(program), description, _load_probe(folder, description), folder)


def _load_probe(folder: Path, description: BackboneDescription) -> tuple[Tensor, ...]:
    path = folder / PROBE_FILE
    if not path.exists():  # archives of format 2 have no file for the probe
        return tuple(spec.probe() for spec in description.inputs)
    try:
        tensors = load_file(path)
        return tuple(tensors[str(number)] for number in range(len(description.inputs)))
    except (OSError, SafetensorError, KeyError) as error:
        raise ArchiveError(f"cannot read the probe of the backbone in {path}: {error}: is the archive damaged?"
                           ) from error


def _identity(program: ExportedProgram, inputs: Sequence[InputSpec]) -> str:
    """Return a hash of everything that determines the answers: input, operations, weights and constants.

    The operations are hashed as torch prints them, so another version of torch may give another hash for the same
    model. New records must then be collected; records with different hashes are never mixed.
    """
    digest = hashlib.sha256(f"{[(spec.shape, spec.dtype) for spec in inputs]} {program.graph}".encode())
    tensors = {**program.state_dict, **{k: v for k, v in program.constants.items() if isinstance(v, Tensor)}}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
