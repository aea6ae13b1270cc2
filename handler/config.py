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

RECORDS_VARIABLE = "EARLY_EXIT_RECORDS"
"""Environment variable that names the records folder when the configuration does not; `ee-serve` sets it."""

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
    """Whether the plan's exits are used; false answers every request in full."""
    engine: str = DEFAULT_ENGINE
    """How the backbone is executed; a name in `ENGINES`."""
    answers: str = PLAIN
    """When answers leave: 'plain' with their batch, 'early' each as soon as it is ready."""
    anytime: bool = False
    """Whether every request runs to the end and hears what every exit would have said."""
    sampling_rate: float | None = None
    """Share of requests recorded, drawn independently of the input and run to the end whatever the exits
    say; by default 1 while the version has no exits and 0.05 once it has."""
    pool: int | str = 4
    """Side to which recorded feature maps are average-pooled; 'raw' records activations whole."""
    layers: int = 8
    """At most this many candidate layers are recorded, spread evenly over the backbone's cost."""
    records: str | None = None
    """Folder for the records; by default that of `EARLY_EXIT_RECORDS`. With neither, nothing is recorded."""
    records_max_bytes: int = 10 * 2**30
    """The oldest shards of this model are deleted beyond this size."""
    records_max_age_s: float = 30 * 24 * 3600.0
    """Shards older than this are deleted."""
    records_per_shard: int = 256
    """A shard is written once it holds this many records."""
    seal_after_s: float = 30.0
    """A shard is written once its first record is this old, in seconds, however few it holds."""
    control_rate: float = 0.02
    """Share of batches that run without exits, or with them where they are bypassed, to find out whether they save
    time; 0 never bypasses them."""
    keep_requests: bool = False
    """Whether what the handler got of the requests is stored too. It may hold personal data."""
    open_headers: bool = False
    """Whether requests without the server's secret may ask for every exit's prediction and for the probe, too."""

    def __post_init__(self) -> None:
        for name in ("exits", "anytime", "keep_requests", "open_headers"):
            _require(isinstance(getattr(self, name), bool), name, "true or false", getattr(self, name))
        for name in ("layers", "records_max_bytes", "records_per_shard"):
            _require(_is_number(getattr(self, name), int) and getattr(self, name) >= 1, name,
                     "a whole number of at least 1", getattr(self, name))
        for name in ("records_max_age_s", "seal_after_s"):
            _require(_is_number(getattr(self, name), int, float) and getattr(self, name) > 0, name,
                     "seconds above 0", getattr(self, name))
        # A list cannot be looked up in a dictionary, and True is 1.
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
        """`pool` as `pool_activation` takes it."""
        return None if self.pool == RAW else int(self.pool)

    def sampling(self, *, has_exits: bool) -> float:
        """Return the share of requests to record and run to the end."""
        if self.sampling_rate is not None:
            return float(self.sampling_rate)
        return 0.05 if has_exits else 1.0

    def records_folder(self) -> Path | None:
        """Return where records go, or None when nothing is to be recorded.

        Raises:
            ConfigError: the environment names a folder relative to the worker's own, which goes when the worker goes.
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
