"""The early_exit block: valid values are accepted, and an error names each invalid one."""

from __future__ import annotations

from pathlib import Path

import pytest

from early_exit.handler.config import ServingConfig
from early_exit.handler.errors import ConfigError
from early_exit.handler.protocol import RECORDS_VARIABLE


def test_a_missing_block_gives_the_defaults() -> None:
    assert ServingConfig.from_model_config({"batchSize": 8}) == ServingConfig.from_model_config(None) == ServingConfig()


@pytest.mark.parametrize(("block", "message"), [
    ({"sampling_rat": 0.5}, "did you mean 'sampling_rate'"),
    ({"nonsense": 1}, "early_exit.nonsense .* expected one of exits"),
    ({"sampling_rate": 1.5}, "early_exit.sampling_rate .* fraction in .* found 1.5"),
    ({"sampling_rate": True}, "early_exit.sampling_rate"),
    ({"engine": "fast"}, "early_exit.engine .* expected one of folded, eager.*found 'fast'"),
    ({"engine": ["folded"]}, r"early_exit.engine .* found \['folded'\]"),
    ({"pool": 3}, "early_exit.pool .* found 3"),
    ({"pool": True}, "early_exit.pool"),
    ({"layers": 0}, "early_exit.layers .* at least 1"),
    ({"keep_requests": "yes"}, "early_exit.keep_requests .* true or false"),
    ({"records": "relative/folder"}, "early_exit.records .* absolute path"),
    ({"records_max_bytes": 0}, "early_exit.records_max_bytes"),
    ({"control_rate": 0.9}, "early_exit.control_rate .* fraction"),
    ({"seal_after_s": -1}, "early_exit.seal_after_s .* seconds"),
    (["pool"], "expected keys and values"),
])
def test_a_wrong_key_or_value_is_an_error_that_names_it(block: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServingConfig.from_model_config({"early_exit": block})


def test_all_is_recorded_until_exits_are_live_then_a_twentieth() -> None:
    assert ServingConfig().sampling(has_exits=False) == 1.0
    assert ServingConfig().sampling(has_exits=True) == 0.05
    assert ServingConfig(sampling_rate=0.3).sampling(has_exits=True) == 0.3


def test_the_configured_folder_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RECORDS_VARIABLE, "/from/environment")
    assert ServingConfig().records_folder() == Path("/from/environment")
    assert ServingConfig(records="/from/config").records_folder() == Path("/from/config")
    monkeypatch.delenv(RECORDS_VARIABLE)
    assert ServingConfig().records_folder() is None


def test_a_folder_below_the_workers_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RECORDS_VARIABLE, "records")
    with pytest.raises(ConfigError, match="EARLY_EXIT_RECORDS: expected an absolute path, found 'records'"):
        ServingConfig().records_folder()
