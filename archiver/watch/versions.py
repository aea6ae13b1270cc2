"""The versions of a model in its store, by number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path


def stored_versions(store: Path, model: str) -> dict[float, Path]:
    """Return the archives of a model in a store by version, if the version is a number."""
    prefix = f"{model}-"
    versions = {mar.stem.removeprefix(prefix): mar for mar in store.glob("*.mar") if mar.stem.startswith(prefix)}
    return {float(version): mar for version, mar in versions.items() if _is_number(version)}


def next_version(store: Path, model: str, registered: Sequence[str]) -> str:
    """Return a version above all versions that a server has registered or the store holds, so that it replaces none."""
    numbers = [float(version) for version in registered if _is_number(version)]
    return f"{int(max([*stored_versions(store, model), *numbers], default=0)) + 1}.0"


def _is_number(version: str) -> bool:
    return version.replace(".", "", 1).isdecimal() and math.isfinite(float(version))
