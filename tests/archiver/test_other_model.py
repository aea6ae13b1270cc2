"""A handler whose model depends on more than the archive: a worker refuses to serve another model than was exported."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.tryout.trials import check
from early_exit.handler.errors import ArchiveError
from tests.archiver.test_tryout import HANDLER, MODEL, PLAIN, Net, samples
from tests.support.original import original_mar

__all__ = ["samples"]

SCALED = MODEL.replace("        self.head =", "        self.scale = 1.0\n        self.head =").replace(
    "self.head(self.body(x))", "self.head(self.body(x)) * self.scale")
ASKED = "float((context.model_yaml_config or {}).get('scale', 1))"


def archive_of(folder: Path, initialize: str, samples: list[Path]) -> Path:
    torch.manual_seed(0)
    (folder / "net.py").write_text(SCALED)
    (folder / "their_handler.py").write_text(HANDLER.format(initialize=initialize, postprocess=PLAIN))
    mar = original_mar(folder / "original", "theirs", str(folder / "net.py"), str(folder / "their_handler.py"),
                       Net().state_dict(), "batchSize: 4\n")
    return build_archive(ArchiveRequest(str(mar), folder / "store", requests=samples))


def loading(mar: Path) -> str:
    with zipfile.ZipFile(mar) as archive:
        return str(json.loads(archive.read("early_exit/handler.json"))["loading"])


@pytest.mark.parametrize(("initialize", "how"), [
    (f"        self.model.scale = {ASKED}", "own"),
    (f"        if {ASKED} != 1:\n            self.model.scale = {ASKED}", "given"),
    (f"        self.model.head.bias.data += 9 * ({ASKED} - 1)", "own"),
    (f"        if {ASKED} != 1:\n            self.model = torch.nn.Sequential(self.model, torch.nn.Tanh()).eval()",
     "given"),
])
def test_a_configuration_that_makes_another_model_is_refused(
        initialize: str, how: str, tmp_path: Path, samples: list[Path]) -> None:
    made = archive_of(tmp_path, initialize, samples)
    assert loading(made) == how
    check(made)
    (tmp_path / "other.yaml").write_text("batchSize: 4\nscale: -1\n")
    with pytest.raises(ArchiveError, match="(has loaded another model than|did not do when)"):
        build_archive(ArchiveRequest(str(made), tmp_path / "store", config=tmp_path / "other.yaml"))


@pytest.mark.parametrize(("initialize", "message"), [
    ("        self.model.scale = float(os.environ.get('SCALE', '1'))", "off by .*depend on an environment variable"),
    ("        if 'SCALE' in os.environ:\n            self.model.scale = 2.0", "sets .scale of the model"),
])
def test_an_environment_that_makes_another_model_is_refused(
        initialize: str, message: str, tmp_path: Path, samples: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made = archive_of(tmp_path, initialize, samples)
    monkeypatch.setenv("EE_ARCHIVE_ENV", "SCALE")  # so that the check sees it, as a worker would
    monkeypatch.setenv("SCALE", "-1")
    with pytest.raises(ArchiveError, match=message):
        check(made)
