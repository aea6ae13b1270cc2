"""The manifest that TorchServe reads from an archive."""

from __future__ import annotations

import json
from typing import Any

from early_exit.handler.archive_layout import HANDLER
from early_exit.handler.errors import ArchiveError

_CREATED = "01/01/1980 00:00:00"
"""The time of creation in every archive. The real time would give the same contents other bytes."""


def manifest_text(original: dict[str, Any], *, name: str, version: str | None, config_file: str | None,
                  replaces: str | None) -> str:
    """Return the text of an early-exit archive's manifest.

    Args:
        original: the manifest that the user's handler expects.
        name: the name of the model.
        version: the version of the model; by default one above the one that it replaces.
        config_file: the name of the archive's model-config.yaml, if it has one.
        replaces: the version of the source.

    Raises:
        ArchiveError: no version is given, and the source's is not a number.
    """
    from model_archiver.manifest_components.manifest import Manifest
    from model_archiver.manifest_components.model import Model

    model = original["model"]
    described = Model(
        model_name=name, serialized_file=None, handler=HANDLER,
        model_version=version or _next_version(replaces),
        requirements_file=model.get("requirementsFile"), config_file=config_file)
    manifest = Manifest("python", described).manifest_dict
    manifest["createdOn"] = _CREATED
    return json.dumps(manifest, indent=1, sort_keys=True)


def _next_version(version: str | None) -> str:
    if version is None:
        return "1.0"
    try:
        return f"{int(float(version)) + 1}.0"
    except (ValueError, OverflowError):  # as for "inf"
        raise ArchiveError(f"the source has version {version!r}, which is not a number to count up from: pass "
                           "--version") from None
