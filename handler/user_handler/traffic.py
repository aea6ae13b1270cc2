"""Which traffic a model gets: the requests that clients send, and what the user's own code makes of them."""

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
"""What TorchServe itself reads of a model-config.yaml: how a model is run, and not what its requests mean."""


def digests_of(folder: Path, names: Collection[str]) -> dict[str, str]:
    """Return the sha256 of the files of an archive by their names; an empty text for one that is not there.

    In a locale without Unicode, such as a container's that sets none, TorchServe unpacks an archive with a question
    mark for each other letter of a name.
    """
    unpacked_as = {name: name.encode("ascii", "replace").decode() for name in sorted(names)}
    return {name: _sha256(folder / name) or _sha256(folder / found) for name, found in unpacked_as.items()}


def users_files(folder: Path, original_manifest: Mapping[str, Any], config_file: str | None) -> list[str]:
    """Return the names of the files in an unpacked archive that decide what the model is given for a request.

    These are the user's: neither ours, nor the manifest, nor the weights, of which the backbone tells, nor the
    configuration, of which only a part counts, nor compiled Python, which no archive of ours holds.

    Args:
        folder: the archive.
        original_manifest: the manifest that the user's handler expects.
        config_file: name of the archive's model-config.yaml, if it has one.
    """
    model = original_manifest["model"]
    others = {model.get("serializedFile"), model.get("configFile"), config_file}
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths
                  if path.parts[0] not in (FOLDER, Path(MANIFEST).parts[0]) and COMPILED not in path.parts
                  and path.as_posix() not in others)


def traffic_identity(backbone: str, original_manifest: Mapping[str, Any], description: HandlerDescription,
                     digests: Mapping[str, str], model_config: Mapping[str, Any] | None) -> str:
    """Return what is equal for two versions of a model if their records are of the same traffic.

    Args:
        backbone: sha256 of the backbone.
        original_manifest: the manifest that the user's handler expects.
        description: of the handler.
        digests: of the user's files.
        model_config: the whole model-config.yaml.

    Returns:
        A hash; empty where the archive was made before this was told apart.
    """
    if description.files is None:
        return ""
    own = {key: value for key, value in (model_config or {}).items() if key != _OURS and key not in _SERVERS}
    handler = original_manifest["model"].get("handler")
    what = [backbone, handler, description.service_envelope, _ordered(digests), _ordered(own)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _ordered(value: Any) -> Any:
    """Return what YAML can hold in a form that is the same whatever the order of keys, which need not be texts."""
    if isinstance(value, Mapping):
        return sorted([repr(key), _ordered(inner)] for key, inner in value.items())
    if isinstance(value, set):  # texts in it come in another order in each process
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
