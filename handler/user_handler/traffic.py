"""The traffic of a model: the requests that clients send, and the inputs that the user's code makes from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from early_exit.handler.archive_layout import COMPILED, FOLDER, MANIFEST
from early_exit.handler.user_handler.description import HandlerDescription

_OURS = "early_exit"
_SERVERS = frozenset((
    "minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout", "deviceType",
    "deviceIds", "parallelLevel", "parallelType", "torchrun", "maxRetryTimeoutInSec", "clientTimeoutInMills",
    "jobQueueSize", "useJobTicket", "useVenv", "asyncCommunication", "continuousBatching", "sequenceBatching",
    "sequenceMaxIdleMSec", "sequenceTimeoutMSec", "maxNumSequence", "maxSequenceJobQueueSize"))
"""The settings in model-config.yaml that TorchServe itself reads. They affect how a model is run, but not which inputs
are made from its requests."""


def digests_of(folder: Path, names: Collection[str]) -> dict[str, str]:
    """Return the sha256 of the files of an archive by their names; it is an empty string for a missing file.

    In a locale without Unicode, such as the locale of a container that sets none, TorchServe replaces each non-ASCII
    character of a file's name by a question mark when it unpacks an archive.
    """
    unpacked_as = {name: name.encode("ascii", "replace").decode() for name in sorted(names)}
    return {name: _sha256(folder / name) or _sha256(folder / found) for name, found in unpacked_as.items()}


def users_files(folder: Path, original_manifest: Mapping[str, Any], config_file: str | None, *,
                with_weights: bool) -> list[str]:
    """Return the names of the files in an unpacked archive that determine the model's input for a request.

    These are the user's files, except for the configuration, of which `traffic_identity` uses a part, and compiled
    Python, which no archive of `ee-archive` contains. The manifest and the files of this project are left out, too.

    Args:
        folder: the folder of the archive.
        original_manifest: the manifest that the user's handler expects.
        config_file: name of the archive's model-config.yaml, if it has one.
        with_weights: whether the handler reads the file with the weights, which may hold more, such as a mean and a
            deviation for its preprocessing. Otherwise they are only a part of the backbone's identity.
    """
    model = original_manifest["model"]
    others = {MANIFEST, model.get("configFile"), config_file, None if with_weights else model.get("serializedFile")}
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths
                  if path.parts[0] != FOLDER and COMPILED not in path.parts and path.as_posix() not in others)


def traffic_identity(backbone: str, original_manifest: Mapping[str, Any], description: HandlerDescription,
                     digests: Mapping[str, str], model_config: Mapping[str, Any] | None) -> str:
    """Return the identity of a version's traffic: it is equal for two versions whose records are of the same traffic.

    Args:
        backbone: sha256 of the backbone.
        original_manifest: the manifest that the user's handler expects.
        description: the description of the handler.
        digests: the sha256 of the user's files by their names.
        model_config: the whole model-config.yaml.

    Returns:
        A hash, or an empty string for an older archive, which does not contain the names of the user's files.
    """
    if description.files is None:
        return ""
    own = {key: value for key, value in (model_config or {}).items() if key != _OURS and key not in _SERVERS}
    handler = original_manifest["model"].get("handler")
    what = [backbone, handler, description.service_envelope, _ordered(digests), _ordered(own)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _ordered(value: Any) -> Any:
    """Return a YAML value in a form that does not depend on the order of keys, which need not be strings."""
    if isinstance(value, Mapping):
        return sorted([repr(key), _ordered(inner)] for key, inner in value.items())
    if isinstance(value, set):  # the order of strings in a set differs from process to process
        return ["set", *sorted(map(repr, value))]
    return [*map(_ordered, value)] if isinstance(value, list) else repr(value)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    except OSError:
        return ""
    return digest.hexdigest()
