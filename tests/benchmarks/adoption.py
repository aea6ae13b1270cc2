"""A user's own server, with its `models={...}`, adopts exits: whether it keeps its settings and can be put back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from early_exit.archiver.control import RunSettings, VersionStatus
from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.rollout.fleet import roll_all
from early_exit.archiver.rollout.roll import roll
from early_exit.archiver.torchserve.addresses import Addresses
from early_exit.archiver.torchserve.management import Management
from early_exit.handler.archive_layout import MANIFEST
from early_exit.handler.errors import ServerError
from tests.support.client import BackgroundLoad, failed, send
from tests.support.digits import traffic, train_backbone
from tests.support.original import original_mar
from tests.support.own_server import own_server
from tests.support.rewritten import renumbered, rewritten

MODEL = "digits"
SETTINGS = RunSettings(batch_size=3, max_batch_delay_ms=37, response_timeout_s=77, workers=(1, 2))
SCALED = (2, 3)


def adoption(folder: Path) -> dict[str, Any]:
    """Return whether settings are kept, and whether a failed first adoption puts the original archive back."""
    store = folder / "store"
    store.mkdir()
    original = original_mar(folder / "original", MODEL, "digits_resnet.py", "digits_handler.py",
                            train_backbone(n_steps=100).state_dict(), "batchSize: 1\n")
    plain = without_configuration(original, store / f"{MODEL}.mar")
    body = traffic(1, seed=8)[0].body
    typical = folder / "typical.png"
    typical.write_bytes(body)
    recorder = build_archive(ArchiveRequest(str(plain), store, input_shape=(1, 32, 32), requests=[typical]))
    renumbered(recorder, store / f"{MODEL}-3.0.mar", "2.0", "3.0")
    assert SETTINGS.workers is not None
    at_start = {"1.0": {"defaultVersion": True, "marName": plain.name, "minWorkers": SETTINGS.workers[0],
                        "maxWorkers": SETTINGS.workers[1], "batchSize": SETTINGS.batch_size,
                        "maxBatchDelay": SETTINGS.max_batch_delay_ms, "responseTimeout": SETTINGS.response_timeout_s}}
    own = folder / "own"
    own.mkdir()
    with own_server(own, store, Addresses.free(), MODEL, [f"models={json.dumps({MODEL: at_start})}"]) as server:
        management = Management(server.addresses, server.key_file)
        assert served(management).settings == SETTINGS, served(management)
        [before] = send(server, MODEL, [body])
        management.scale(MODEL, "1.0", SCALED)
        with BackgroundLoad(server, MODEL, [body], clients=2, pause_s=0.0) as load:
            put_back, said = is_put_back(management, recorder)
        [after] = send(server, MODEL, [body])
        put_back &= failed(load.replies) == 0 and (before.body, before.version) == (after.body, after.version)
        kept = []
        for mar, workers in ((recorder, SETTINGS.workers), (store / f"{MODEL}-3.0.mar", SCALED)):
            management.scale(MODEL, served(management).version, workers)
            roll(management, mar, longest_batch_s=1.0)
            kept.append(vars(served(management).settings))
    expected = [vars(SETTINGS), {**vars(SETTINGS), "workers": SCALED}]
    return {"settings_kept": kept == expected, "put_back_to_original": put_back,
            "adoption": {"settings": kept, "put_back_said": said, "requests": len(load.replies),
                         "failed": failed(load.replies)}}


def is_put_back(management: Management, recorder: Path) -> tuple[bool, str]:
    """Adopt exits on two servers, the second of which cannot be reached; tell whether the first is as it was, with the
    workers that it had been given while it served."""
    nobody = Management(Addresses.free(), None)
    try:
        roll_all([management, nobody], recorder, put_back=True, longest_batch_s=1.0)
    except ServerError as error:
        versions = management.versions(MODEL)
        is_as_before = [(status.version, status.settings) for status in versions] == [
            ("1.0", replace(SETTINGS, workers=SCALED))]
        return is_as_before and str(error).endswith("was put back to 1.0"), str(error)
    return False, "the second server was rolled"


def served(management: Management) -> VersionStatus:
    return next(status for status in management.versions(MODEL) if status.is_default)


def without_configuration(mar: Path, target: Path) -> Path:
    """Copy an archive without its model-config.yaml, so that TorchServe uses the settings of its own configuration."""
    return rewritten(mar, target, drop="model-config.yaml", **{MANIFEST: lambda text: json.dumps(
        {**(manifest := json.loads(text)), "model": {key: value for key, value in manifest["model"].items()
                                                     if key != "configFile"}})})
