"""Archives are self-contained, reproducible and validated before they appear; bad sources are refused."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from early_exit.archiver.packaging.archive import build_archive
from early_exit.archiver.packaging.cli import main
from early_exit.archiver.packaging.describe import describe
from early_exit.archiver.packaging.request import ArchiveRequest
from early_exit.archiver.packaging.sources.sample import sample_images
from early_exit.archiver.packaging.tryout.trials import check
from early_exit.handler.archive_contents import read_archive
from early_exit.handler.archive_layout import MANIFEST, extract
from early_exit.handler.backbone.export import export_backbone
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.errors import ArchiveError, ConfigError, PlanError
from tests.support.digits import batches, traffic
from tests.support.models.digits_resnet import DigitsResNet
from tests.support.original import MODELS, original_mar
from tests.support.plans import write_plan
from tests.support.rewritten import rewritten
from tests.support.served import served_model
from tests.support.untried import build_untried

SHAPE = (1, 32, 32)


@torch.no_grad()
def test_without_a_plan_the_answers_are_the_original_models(recorder_mar: Path, digits_backbone: DigitsResNet) -> None:
    served = served_model(recorder_mar)
    for batch in batches(traffic(32, seed=3), 8):
        torch.testing.assert_close(served(batch), digits_backbone(batch), atol=1e-5, rtol=1e-5)


def test_the_same_source_gives_the_same_bytes(recorder_mar: Path, digits_mar: Path, tmp_path: Path) -> None:
    again = build_untried(ArchiveRequest(str(digits_mar), tmp_path, input_shape=SHAPE))
    assert again.read_bytes() == recorder_mar.read_bytes()


def test_an_archive_holds_the_weights_once_and_the_users_files(recorder_mar: Path, digits_mar: Path) -> None:
    with zipfile.ZipFile(recorder_mar) as archive:
        members = archive.infolist()
    names = [one.filename for one in members]
    assert "weights.pth" not in names
    assert {"digits_handler.py", "digits_resnet.py", "model-config.yaml", "early_exit/handler/service.py"} <= set(names)
    assert not [name for name in names if name.endswith(".pkl")]
    largest = sorted((one.file_size for one in members), reverse=True)
    weights = digits_mar.stat().st_size
    assert largest[0] > 0.8 * weights > largest[1], "one member holds the weights and no other comes near"


def test_the_version_counts_up_and_a_name_that_is_given_once_is_kept(recorder_mar: Path, tmp_path: Path) -> None:
    assert recorder_mar.name == "digits-2.0.mar"
    assert build_untried(ArchiveRequest(str(recorder_mar), tmp_path)).name == "digits-3.0.mar"
    given = build_untried(ArchiveRequest(str(recorder_mar), tmp_path, version="7.5", model_name="numbers"))
    assert (given.name, describe(given)["model"]) == ("numbers-7.5.mar", "numbers")
    assert build_untried(ArchiveRequest(str(given), tmp_path)).name == "numbers-8.0.mar"


@torch.no_grad()
def test_with_a_plan_confident_rows_exit_early(recorder_mar: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "run", recorder_mar, threshold=0.3)
    exiting = build_archive(ArchiveRequest(str(recorder_mar), tmp_path, plan=plan))
    archive = read_archive(exiting)
    exits = {planned.layer for planned in archive.plan.exits} if archive.plan else set()
    left_at = archive.sample_answers.keys()
    assert left_at <= {*exits, "full"} and len(left_at) >= 2, "at the first exit that is sure, and without exits"
    assert all(len(answer) == 3 for answer in archive.sample_answers.values()), "as the user's handler answers"
    served = served_model(exiting)
    served(next(iter(batches(traffic(16, seed=4), 16))))
    assert (served.log.take()[0].answers.stages >= 0).any()
    assert [one["layer"] for one in describe(exiting)["plan"]["exits"]] == list(served.assembly.layers)


def test_a_plan_can_be_put_on_the_original_archive_too(digits_mar: Path, recorder_mar: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "run", recorder_mar)
    exiting = build_untried(ArchiveRequest(str(digits_mar), tmp_path, plan=plan, input_shape=SHAPE, version="9.0"))
    assert describe(exiting)["backbone"]["sha256"] == describe(recorder_mar)["backbone"]["sha256"]


def test_a_plan_made_for_other_weights_is_refused_and_nothing_appears(recorder_mar: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "run", recorder_mar, backbone="0" * 64)
    with pytest.raises(PlanError, match="made for the backbone 000000"):
        build_archive(ArchiveRequest(str(recorder_mar), tmp_path / "store", plan=plan))
    assert not list((tmp_path / "store").glob("*"))


def test_entries_that_leave_the_archive_are_refused(digits_mar: Path, tmp_path: Path) -> None:
    evil = rewritten(digits_mar, tmp_path / "evil.mar", **{"../outside.py": b"x"})
    with pytest.raises(ArchiveError, match=r"'\.\./outside\.py', which leaves the archive"):
        build_archive(ArchiveRequest(str(evil), tmp_path / "store", input_shape=SHAPE))
    assert not (tmp_path / "outside.py").exists()


class Anything:
    """A stand-in for arbitrary code in a pickle."""


def test_an_entry_without_a_name_is_refused(digits_mar: Path, tmp_path: Path) -> None:
    evil = rewritten(digits_mar, tmp_path / "evil.mar", **{"./": b""})
    with pytest.raises(ArchiveError, match=r"'\./', which leaves the archive"):
        build_archive(ArchiveRequest(str(evil), tmp_path / "store", input_shape=SHAPE))


def test_another_archive_of_that_name_is_not_replaced(recorder_mar: Path, tmp_path: Path) -> None:
    made = build_untried(ArchiveRequest(str(recorder_mar), tmp_path, version="7.0"))
    before = made.read_bytes()
    plan = write_plan(tmp_path / "run", recorder_mar)
    with pytest.raises(ArchiveError, match=r"digits-7\.0\.mar exists already .* pass another --version"):
        build_untried(ArchiveRequest(str(recorder_mar), tmp_path, plan=plan, version="7.0"))
    assert made.read_bytes() == before


def test_weights_with_anything_but_tensors_are_refused(digits_mar: Path, tmp_path: Path) -> None:
    torch.save({"fc.weight": Anything()}, tmp_path / "weights.pth")
    evil = rewritten(digits_mar, tmp_path / "evil.mar", **{"weights.pth": (tmp_path / "weights.pth").read_bytes()})
    with pytest.raises(ArchiveError, match=r"more than tensors.*state_dict"):
        build_archive(ArchiveRequest(str(evil), tmp_path / "store", input_shape=SHAPE))


def test_a_torchscript_archive_is_refused_with_what_to_do(digits_mar: Path, tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "model.pt"))
    with zipfile.ZipFile(digits_mar) as archive:
        manifest = json.loads(archive.read(MANIFEST))
    del manifest["model"]["modelFile"]
    manifest["model"]["serializedFile"] = "model.pt"
    scripted = rewritten(digits_mar, tmp_path / "scripted.mar", drop="weights.pth", **{
        MANIFEST: json.dumps(manifest).encode(), "model.pt": (tmp_path / "model.pt").read_bytes()})
    with pytest.raises(ArchiveError, match="calls a TorchScript model, and torch.export needs the eager model"):
        build_archive(ArchiveRequest(str(scripted), tmp_path / "store", input_shape=SHAPE))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8-sig"])
def test_labels_that_torchserve_cannot_read_are_named(digits_mar: Path, tmp_path: Path, encoding: str) -> None:
    names = '{"0": "zéro"}'.encode(encoding)
    source = rewritten(digits_mar, tmp_path / "named.mar", **{"index_to_name.json": names})
    with pytest.raises(ArchiveError, match=r"digits_handler\.py cannot read index_to_name\.json .*UTF-8") as refusal:
        build_archive(ArchiveRequest(str(source), tmp_path / "store", input_shape=SHAPE))
    assert "Traceback" not in str(refusal.value)


def test_a_package_that_is_not_installed_is_named_with_the_place_to_name_it(digits_mar: Path, tmp_path: Path) -> None:
    source = rewritten(digits_mar, tmp_path / "needing.mar", **{
        "digits_handler.py": lambda text: "import a_package_of_nobody\n" + text})
    with pytest.raises(ArchiveError, match="needs 'a_package_of_nobody', which is not installed.*requirements file"):
        build_archive(ArchiveRequest(str(source), tmp_path / "store", input_shape=SHAPE))


def test_a_damaged_archive_is_refused(recorder_mar: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.mar"
    content = bytearray(recorder_mar.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    with pytest.raises(ArchiveError, match="damaged|cannot read"):
        build_archive(ArchiveRequest(str(damaged), tmp_path / "store"))


def test_a_wrong_configuration_is_refused_before_anything_appears(recorder_mar: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("early_exit:\n  sampling: 0.5\n")
    with pytest.raises(ConfigError, match="early_exit.sampling .* did you mean 'sampling_rate'"):
        build_archive(ArchiveRequest(str(recorder_mar), tmp_path / "store", config=tmp_path / "config.yaml"))
    assert not list((tmp_path / "store").glob("*"))


def test_an_archive_that_does_not_answer_is_not_published(digits_mar: Path, tmp_path: Path) -> None:
    (tmp_path / "digit.png").write_bytes(sample_images(SHAPE)[0].parts[0].value)
    broken = rewritten(digits_mar, tmp_path / "broken.mar", **{
        "digits_handler.py": (MODELS / "digits_handler.py").read_bytes().replace(
            b"topk = 3", b"topk = 3\n\n    def postprocess(self, data):\n        raise ValueError('no more')\n")})
    with pytest.raises(ArchiveError, match="(?s)does not answer the sample request.*EE_ARCHIVE_ENV.*no more"):
        build_archive(ArchiveRequest(str(broken), tmp_path / "store", requests=[tmp_path / "digit.png"]))
    assert not list((tmp_path / "store").glob("*"))


def test_a_handler_that_loads_its_own_weights_keeps_them(digits_mar: Path, tmp_path: Path) -> None:
    own = b"""
import torch
from digits_resnet import DigitsResNet
from torchvision import transforms
from PIL import Image
import io, os

class OwnHandler:
    def initialize(self, context):
        self.model = DigitsResNet()
        folder = context.system_properties["model_dir"]
        self.model.load_state_dict(torch.load(os.path.join(folder, "weights.pth"), weights_only=True))
        self.model.eval()

    def handle(self, data, context):
        images = [transforms.ToTensor()(Image.open(io.BytesIO(item["body"])).convert("L")) for item in data]
        with torch.no_grad():
            return self.model(torch.stack(images)).argmax(1).tolist()
"""
    mar = rewritten(digits_mar, tmp_path / "own.mar", **{"digits_handler.py": own})
    archive = build_archive(ArchiveRequest(str(mar), tmp_path / "store", input_shape=SHAPE))
    with zipfile.ZipFile(archive) as built:
        assert "weights.pth" in built.namelist()


def test_the_builtin_image_classifier_tells_the_input_shape_itself(tmp_path: Path) -> None:
    """No shape is given: `ee-archive` takes it from what the handler's preprocessing makes of a sample image."""
    (tmp_path / "small_net.py").write_text(
        "from torch import nn\n\nclass SmallNet(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(3, 4, 7, 4), nn.ReLU(), nn.Conv2d(4, 8, 3, 2), nn.ReLU(),\n"
        "                         nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(8, 6))\n")
    layers = {"0": nn.Conv2d(3, 4, 7, 4), "2": nn.Conv2d(4, 8, 3, 2), "4": nn.Conv2d(8, 8, 3, 2), "8": nn.Linear(8, 6)}
    weights = {f"{key}.{name}": tensor for key, layer in layers.items() for name, tensor in layer.state_dict().items()}
    mar = original_mar(tmp_path / "original", "small", str(tmp_path / "small_net.py"), "image_classifier", weights,
                       "batchSize: 1\n")
    assert describe(build_untried(ArchiveRequest(str(mar), tmp_path)))["backbone"]["input_shape"] == (3, 224, 224)


def test_a_handler_that_keeps_image_sizes_needs_the_shape(digits_mar: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="inputs of different sizes.*--input-shape"):
        build_archive(ArchiveRequest(str(digits_mar), tmp_path))


def test_a_factory_with_safetensors_and_a_pt2_give_the_same_backbone(
        digits_backbone: DigitsResNet, recorder_mar: Path, tmp_path: Path) -> None:
    save_file(digits_backbone.state_dict(), tmp_path / "weights.safetensors")
    handler = str(MODELS / "digits_handler.py")
    made = build_untried(ArchiveRequest(
        "tests.support.models.digits_resnet:DigitsResNet", tmp_path, weights=tmp_path / "weights.safetensors",
        input_shape=SHAPE, handler=handler, model_name="made"))
    torch.export.save(export_backbone(digits_backbone, [InputSpec("x", SHAPE)])[0], tmp_path / "model.pt2")
    exported = build_archive(ArchiveRequest(str(tmp_path / "model.pt2"), tmp_path, handler=handler, model_name="pt2"))
    expected = describe(recorder_mar)["backbone"]["candidates"]
    assert describe(made)["backbone"]["candidates"] == describe(exported)["backbone"]["candidates"] == expected


@torch.no_grad()
def test_a_mar_whose_handler_loads_an_exported_program_is_taken(digits_mar: Path, digits_backbone: DigitsResNet,
                                                                recorder_mar: Path, tmp_path: Path) -> None:
    torch.export.save(export_backbone(digits_backbone, [InputSpec("x", SHAPE)])[0], tmp_path / "model.pt2")

    def of_a_program(text: str) -> str:
        manifest = json.loads(text)
        del manifest["model"]["modelFile"]
        manifest["model"] |= {"serializedFile": "model.pt2", "handler": "program_handler.py"}
        return json.dumps(manifest)

    source = rewritten(digits_mar, tmp_path / "program.mar", drop="weights.pth", **{
        MANIFEST: of_a_program, "model.pt2": (tmp_path / "model.pt2").read_bytes(),
        "program_handler.py": (MODELS / "program_handler.py").read_bytes()})
    made = build_archive(ArchiveRequest(str(source), tmp_path / "store", input_shape=SHAPE))
    assert describe(made)["backbone"]["candidates"] == describe(recorder_mar)["backbone"]["candidates"]
    batch = next(iter(batches(traffic(8, seed=5), 8)))
    torch.testing.assert_close(served_model(made)(batch), digits_backbone(batch), atol=1e-5, rtol=1e-5)


def test_the_archives_own_handler_code_is_used_not_the_installed_one(recorder_mar: Path, tmp_path: Path) -> None:
    extract(recorder_mar, tmp_path)
    service = tmp_path / "early_exit" / "handler" / "service.py"
    service.write_text("raise ImportError('the copy in the archive')\n")
    with zipfile.ZipFile(tmp_path / "changed.mar", "w") as changed:
        for file in [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".mar"]:
            changed.write(file, str(file.relative_to(tmp_path)))
    with pytest.raises(ArchiveError, match="the copy in the archive"):
        check(tmp_path / "changed.mar")


def test_show_prints_exits_and_reasons_and_json(recorder_mar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(recorder_mar)]) == 0
    printed = capsys.readouterr().out
    assert "0 exits of" in printed and "left out:" in printed
    assert main(["show", str(recorder_mar), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "digits"


def test_a_users_mistake_is_a_message_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "missing.mar")]) == 1
    assert "missing.mar" in capsys.readouterr().err
    shutil.rmtree(tmp_path)


def test_the_asked_engine_is_stored_and_kept_by_later_archives(recorder_mar: Path, tmp_path: Path) -> None:
    eager = build_untried(ArchiveRequest(str(recorder_mar), tmp_path, engine="eager"))
    assert describe(recorder_mar)["engine"] == "folded"
    again = build_untried(ArchiveRequest(str(eager), tmp_path))
    assert describe(eager)["engine"] == describe(again)["engine"] == "eager"
