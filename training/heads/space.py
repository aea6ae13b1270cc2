"""The heads that a search may try; users may change the search space in a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from early_exit.handler.backbone.pooling import Side, pooled_shape
from early_exit.handler.config import RAW
from early_exit.handler.errors import ConfigError, PlanError, did_you_mean
from early_exit.handler.exits.head import Convolution, HeadSpec
from early_exit.training.text_files import read_yaml

MAX_CONVOLUTIONS, MAX_LINEARS = 2, 2


@dataclass(frozen=True)
class SearchSpace:
    """The values that each part of a head may take (section 3.2.1 of the paper).

    Raises:
        ConfigError: no head can have one of the values; the message names it.
    """

    pool: tuple[int | str, ...] = (1, 2, 4, RAW)
    """The sides to which feature maps are pooled; `raw` reads them as they were recorded."""
    convolutions: tuple[int, ...] = (0, 1, 2)
    """The numbers of convolutions, at most 2."""
    kernel: tuple[int, ...] = (1, 3)
    """The sizes of the kernels of a convolution."""
    stride: tuple[int, ...] = (1, 2)
    """The strides of a convolution."""
    channels: tuple[int, ...] = (32, 64, 96)
    """The numbers of output channels of a convolution."""
    separable: tuple[bool, ...] = (False, True)
    """Whether a convolution is split into a depthwise and a pointwise one."""
    linears: tuple[int, ...] = (0, 1)
    """The numbers of linear layers before the classifier, at most 2."""
    width: tuple[int, ...] = (32, 64, 128)
    """The numbers of units of such a linear layer."""
    heads: Mapping[str, HeadSpec] = field(default_factory=dict)
    """The heads that you choose yourself, by the path of their layer. The search skips these layers."""

    def __post_init__(self) -> None:
        limits = {"convolutions": MAX_CONVOLUTIONS, "linears": MAX_LINEARS}
        for name in (part.name for part in fields(self) if part.name != "heads"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not values:
                raise ConfigError(f"search space: {name} needs a list of values, found {values!r}")
            for value in values:
                if not _fits(name, value, limits.get(name)):
                    raise ConfigError(f"search space: {value!r} is not a possible value for {name}")

    @classmethod
    def load(cls, path: Path) -> SearchSpace:
        """Read a YAML file; parts that it does not name keep their defaults.

        Raises:
            ConfigError: the file cannot be read, or has an unknown key or a wrong value.
        """
        data = read_yaml(path, "the search space") or {}
        known = [part.name for part in fields(cls)]
        for key in data if isinstance(data, dict) else ():
            if key not in known:
                raise ConfigError(f"search space: {key!r} in {path} is not a setting, {did_you_mean(key, known)}")
        if not isinstance(data, dict):
            raise ConfigError(f"search space: expected keys and values in {path}, found {data!r}")
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value
                                  for key, value in data.items() if key != "heads"}
        try:
            heads = {str(layer): _given(head) for layer, head in (data.get("heads") or {}).items()}
        except (PlanError, AttributeError) as error:
            raise ConfigError(f"search space: heads in {path}: {error}") from error
        return cls(**values, heads=heads)

    def choices(self, shape: tuple[int, ...], recorded: Side) -> dict[str, dict[str, Any]]:
        """Return NNI's description of the space for one layer, in the flat form that NNI's tuners need.

        Args:
            shape: the shape of one row of the layer's activation.
            recorded: the side to which the records were pooled.
        """
        layers = {f"width{number}": self.width for number in range(1, max(self.linears) + 1)}
        values: dict[str, tuple[Any, ...]] = {"linears": self.linears, **layers}
        if len(shape) == 3:
            side = max(pooled_shape(shape, recorded)[1:])
            # All sides that pool nothing are one choice, `raw`.
            pools = tuple(dict.fromkeys(RAW if pool == RAW or int(pool) >= side else pool for pool in self.pool))
            values |= {"pool": pools, "convolutions": self.convolutions}
            for number in range(1, max(self.convolutions) + 1):
                values |= {f"{name}{number}": getattr(self, name)
                           for name in ("kernel", "stride", "channels", "separable")}
        return {name: {"_type": "choice", "_value": list(options)} for name, options in values.items()}


def default_head(recorded: Side) -> HeadSpec:
    """Return the head that a layer gets without a search, for records pooled to a side."""
    return HeadSpec(pool=recorded, recorded=recorded)


def default_choice(choices: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the tuner's choice that stands for the default head, or None if the space has no such head."""
    default = default_head(None)
    wanted = {"pool": RAW, "convolutions": len(default.convolutions), "linears": len(default.widths),
              **{f"width{number}": width for number, width in enumerate(default.widths, 1)}}
    choice = {name: wanted.get(name, options["_value"][0]) for name, options in choices.items()}
    return choice if all(value in choices[name]["_value"] for name, value in choice.items()) else None


def used(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a tuner's choice that the head uses; a head with one linear layer has no second width.

    >>> used({"linears": 1, "width1": 64, "width2": 32})
    {'linears': 1, 'width1': 64}
    """
    def shows(name: str) -> bool:
        if not name[-1].isdigit():
            return True
        if int(name[-1]) > parameters["linears" if name.startswith("width") else "convolutions"]:
            return False
        return not name.startswith("separable") or _is_wide(parameters, name[-1])

    return {name: value for name, value in parameters.items() if shows(name)}


def spec_of(parameters: Mapping[str, Any], shape: tuple[int, ...], recorded: Side) -> HeadSpec:
    """Return the head that a tuner's choice stands for; unused parameters have no effect.

    >>> spec_of({"linears": 1, "width1": 64, "width2": 32}, (128,), None).widths
    (64,)
    """
    widths = tuple(int(parameters[f"width{number}"]) for number in range(1, parameters["linears"] + 1))
    if len(shape) != 3:
        return HeadSpec(pool=recorded, widths=widths, recorded=recorded)
    convolutions = tuple(
        Convolution(parameters[f"kernel{number}"], parameters[f"stride{number}"], parameters[f"channels{number}"],
                    parameters[f"separable{number}"] and _is_wide(parameters, number))
        for number in range(1, parameters["convolutions"] + 1))
    pool = recorded if parameters["pool"] == RAW else int(parameters["pool"])
    return HeadSpec(pool=pool, convolutions=convolutions, widths=widths, recorded=recorded)


def _is_wide(parameters: Mapping[str, Any], number: int | str) -> bool:
    """Tell whether a convolution reads neighbours, so that splitting it into depthwise and pointwise saves anything."""
    return bool(parameters[f"kernel{number}"] > 1)


def given_head(spec: HeadSpec, recorded: Side) -> HeadSpec:
    """Return a user's head for records pooled to a side; 'raw' reads them as they are.

    Raises:
        ConfigError: the head reads a larger side than was recorded.
    """
    if spec.pool is None:
        return replace(spec, pool=recorded, recorded=recorded)
    if recorded is not None and spec.pool > recorded:
        raise ConfigError(f"the head '{spec.in_words()}' reads more than the records hold, which are pooled to "
                          f"{recorded}: set early_exit.pool before recording, or train with --replay")
    return replace(spec, recorded=recorded)


def _given(head: Mapping[str, Any]) -> HeadSpec:
    pool = head.get("pool")
    return HeadSpec.from_json({"convolutions": [], "widths": [], **head, "pool": None if pool == RAW else pool})


def _fits(name: str, value: Any, limit: int | None) -> bool:
    if name == "separable":
        return isinstance(value, bool)
    if name == "pool" and value == RAW:
        return True
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    if limit is not None:
        return 0 <= value <= limit
    return value in (1, 3, 5, 7) if name == "kernel" else value >= 1
