"""The ``early_exit:`` block of model-config.yaml."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from early_exit.handler.backbone.pooling import Side
from early_exit.handler.engines.registry import DEFAULT_ENGINE, ENGINES
from early_exit.handler.errors import ConfigError, did_you_mean
from early_exit.handler.protocol import RECORDS_VARIABLE

RAW = "raw"
POOL_SIDES = (1, 2, 4, 8, RAW)
PLAIN, EARLY = "plain", "early"
ANSWERS = (PLAIN, EARLY)


@dataclass(frozen=True)
class ServingConfig:
    """How one model version serves and records.

    Raises:
        ConfigError: a value is out of its range; the message names the key.
    """

    exits: bool = True
    """Whether the exits of the plan are used. `false` answers every request with the whole model."""
    engine: str = DEFAULT_ENGINE
    """The engine that executes the model: `folded`, `eager`, `bfloat16`, `openvino` or `openvino-int8`.
    `ee-archive --engine` writes this key."""
    answers: str = PLAIN
    """When answers are sent: with `plain`, all answers of a batch together; with `early`, each answer as soon as its
    request has left at an exit."""
    anytime: bool = False
    """Whether every request runs to the end and its response tells what each exit would have answered."""
    sampling_rate: float | None = None
    """The share of requests that form the shadow sample: they are drawn independently of the input, recorded, and run
    to the end whatever the exits say. By default it is 1 while the version has no exits, and 0.05 once it has."""
    pool: int | str = 4
    """The side (1, 2, 4 or 8) to which recorded feature maps are average-pooled; `raw` records whole activations.
    After a change, training skips the records that were written before."""
    layers: int = 8
    """The largest number of candidate layers that are recorded. They are spread evenly over the backbone's cost."""
    records: str | None = None
    """The folder for the records, an absolute path. By default it is the folder in `EARLY_EXIT_RECORDS`, which
    `ee-serve` sets. Where neither is set, nothing is recorded."""
    records_max_bytes: int = 10 * 2**30
    """The largest size of all shards of this model, in bytes. Beyond it, the oldest shards are deleted."""
    records_max_age_s: float = 30 * 24 * 3600.0
    """The age in seconds at which a shard is deleted."""
    records_per_shard: int = 256
    """The number of records at which a shard is written."""
    seal_after_s: float = 30.0
    """The age of its first record, in seconds, at which a shard is written, however few records it holds."""
    control_rate: float = 0.02
    """The share of batches that run without exits, to measure whether the exits save time. Exits that save none are
    bypassed; then this is the share of batches that run with exits. With 0, exits are never bypassed."""
    keep_requests: bool = False
    """Whether records also hold what the handler received of the request: bytes, texts and JSON of all parts, with
    their content types. This can be personal data."""
    open_headers: bool = False
    """Whether any client may ask for the prediction of every exit and for the probe, each of which costs a full pass.
    Otherwise such a request needs the server's secret."""

    def __post_init__(self) -> None:
        for name in ("exits", "anytime", "keep_requests", "open_headers"):
            _require(isinstance(getattr(self, name), bool), name, "true or false", getattr(self, name))
        for name in ("layers", "records_max_bytes", "records_per_shard"):
            _require(_is_number(getattr(self, name), int) and getattr(self, name) >= 1, name,
                     "a whole number of at least 1", getattr(self, name))
        for name in ("records_max_age_s", "seal_after_s"):
            _require(_is_number(getattr(self, name), int, float) and getattr(self, name) > 0, name,
                     "seconds above 0", getattr(self, name))
        # A list is not hashable, and True == 1, so neither may reach the look-ups below.
        _require(isinstance(self.engine, str) and self.engine in ENGINES, "engine", f"one of {', '.join(ENGINES)}",
                 self.engine)
        _require(self.answers in ANSWERS, "answers", f"one of {', '.join(ANSWERS)}", self.answers)
        _require(not isinstance(self.pool, bool) and self.pool in POOL_SIDES, "pool", f"one of {POOL_SIDES}", self.pool)
        _require(self.records is None or (isinstance(self.records, str) and Path(self.records).is_absolute()),
                 "records", "an absolute path", self.records)
        _require(self.sampling_rate is None or (_is_number(self.sampling_rate, int, float)
                                                and 0 <= self.sampling_rate <= 1),
                 "sampling_rate", "a fraction in [0, 1]", self.sampling_rate)
        _require(_is_number(self.control_rate, int, float) and 0 <= self.control_rate <= 0.5,
                 "control_rate", "a fraction in [0, 0.5]", self.control_rate)

    @classmethod
    def from_model_config(cls, model_config: Mapping[str, Any] | None) -> ServingConfig:
        """Read the block from a parsed model-config.yaml; a missing block gives the defaults.

        Raises:
            ConfigError: the block is not a mapping, or holds an unknown key or a wrong value.
        """
        if not isinstance(model_config, Mapping | None):
            raise ConfigError(f"model-config.yaml: expected keys and values, found {type(model_config).__name__}")
        block = (model_config or {}).get("early_exit")
        if block is None:
            return cls()
        if not isinstance(block, Mapping):
            raise ConfigError(f"early_exit: expected keys and values, found {block!r} in model-config.yaml")
        known = [field.name for field in fields(cls)]
        for key in block:
            if key not in known:
                raise ConfigError(f"early_exit.{key} in model-config.yaml is not a setting: {did_you_mean(key, known)}")
        return cls(**block)

    @property
    def pool_side(self) -> Side:
        """`pool` in the form that `pool_activation` takes."""
        return None if self.pool == RAW else int(self.pool)

    def sampling(self, *, has_exits: bool) -> float:
        """Return the share of requests that form the shadow sample."""
        if self.sampling_rate is not None:
            return float(self.sampling_rate)
        return 0.05 if has_exits else 1.0

    def records_folder(self) -> Path | None:
        """Return the folder for records, or None if nothing is recorded.

        Raises:
            ConfigError: the environment variable holds a relative path. Such a path would lie in the worker's own
                folder, which is deleted with the worker.
        """
        folder = self.records or os.environ.get(RECORDS_VARIABLE)
        if folder and not Path(folder).is_absolute():
            raise ConfigError(f"{RECORDS_VARIABLE}: expected an absolute path, found {folder!r}")
        return Path(folder) if folder else None


def _is_number(value: object, *kinds: type) -> bool:
    # YAML's true is an int in Python, and 'pool: true' is a mistake.
    return isinstance(value, kinds) and not isinstance(value, bool)


def _require(holds: bool, key: str, expected: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"early_exit.{key} in model-config.yaml: expected {expected}, found {found!r}")
