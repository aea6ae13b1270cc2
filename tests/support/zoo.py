"""Classifiers of public libraries with random weights, which are small if the library allows it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from early_exit.handler.backbone.backbone import Backbone
from early_exit.handler.backbone.signature import InputSpec
from early_exit.handler.detection.loading import load_backbone
from early_exit.handler.model.early_exit_model import EarlyExitModel
from early_exit.handler.model.loading import build_model

VOCABULARY, LENGTH = 99, 12


@dataclass(frozen=True)
class Specimen:
    """A model of a library, and the inputs that it takes."""

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[InputSpec, ...]

    def export(self, model: nn.Module) -> Backbone:
        return Backbone.from_inputs(model, self.inputs)

    def served(self, backbone: Backbone) -> EarlyExitModel:
        """Return a backbone as it serves from an archive: written, read again, cut at every candidate, and folded."""
        with tempfile.TemporaryDirectory() as folder:
            backbone.save(Path(folder))
            read = load_backbone(Path(folder))
        return build_model(read, record_layers=len(read.description.candidates))

    def batch(self, size: int) -> dict[str, Tensor]:
        """Return images of noise, or texts of random tokens with masks that show where each text ends."""
        if self.inputs[0].dtype == "float32":
            return {one.name: torch.randn(size, *one.shape) for one in self.inputs}
        tokens = torch.randint(3, VOCABULARY, (size, LENGTH))
        mask = (torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (size, 1))).long()
        return {one.name: values for one, values in zip(self.inputs, (tokens, mask))}

    def scores(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        output = model(*inputs.values()) if len(inputs) == 1 else model(**inputs)
        scores: Tensor = output if isinstance(output, Tensor) else output["logits"]
        return scores


def image(side: int, name: str = "x") -> tuple[InputSpec, ...]:
    return (InputSpec(name, (3, side, side)),)


def text(length: int) -> tuple[InputSpec, ...]:
    return tuple(InputSpec(name, (length,), "int64") for name in ("input_ids", "attention_mask"))


def torchvision_classifiers() -> Iterator[Specimen]:
    """Yield every classification model of torchvision. Those with the most parameters come last."""
    import torchvision

    def specimen(name: str) -> Specimen:
        # This is the least side that a model's strides, patches or windows allow. Operations are the same at any side.
        side = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56}.get(name, 64)
        more: dict[str, object] = {"image_size": side} if name.startswith("vit_") else {}
        if name in ("googlenet", "inception_v3"):
            more = {"init_weights": False, "aux_logits": False}  # sampling would take minutes
        return Specimen(name, lambda: torchvision.models.get_model(name, weights=None, **more), image(side))

    large = ("vit_h", "vit_l", "vgg", "regnet_y_128", "convnext_large", "wide_resnet", "efficientnet_v2_l")
    names = torchvision.models.list_models(module=torchvision.models)
    yield from map(specimen, sorted(names, key=lambda name: (name.startswith(large), name)))


TIMM = (
    "resnet18", "resnet50d", "resnetv2_50", "seresnet50", "resnest14d", "res2net50_14w_8s", "efficientnet_b0",
    "tf_efficientnetv2_b0", "mobilenetv3_small_100", "mobilenetv4_conv_small", "mnasnet_small", "ghostnet_100",
    "lcnet_050", "regnetx_002", "regnety_002", "densenet121", "vgg11_bn", "darknet53", "cspresnet50", "dla34",
    "hrnet_w18_small", "inception_v3", "xception41", "repvgg_a0", "convnext_atto", "convnextv2_atto", "poolformer_s12",
    "mixer_s32_224", "resmlp_12_224", "gmlp_s16_224", "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "beit_base_patch16_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "swin_tiny_patch4_window7_224",
    "pvt_v2_b0", "twins_svt_small", "mobilevit_xxs", "edgenext_xx_small", "levit_128s", "coat_lite_tiny",
    "crossvit_9_240", "convit_tiny", "visformer_tiny", "nest_tiny", "efficientformer_l1", "fastvit_t8",
    "repvit_m0_9", "tiny_vit_5m_224")


def timm_classifiers() -> Iterator[Specimen]:
    """Yield one small model of each of fifty architectures in timm, at its own image size."""
    import timm

    for name in TIMM:
        side = timm.get_pretrained_cfg(name, allow_unregistered=True).input_size[-1]
        yield Specimen(name, lambda name=name: timm.create_model(name, pretrained=False), image(side))


SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 5}
TEXT_MODELS: dict[str, dict[str, object]] = {
    "Bert": {}, "Roberta": {}, "Electra": {"embedding_size": 32}, "Albert": {"embedding_size": 16}, "DebertaV2": {},
    "MPNet": {}, "XLMRoberta": {}, "Camembert": {}, "Ernie": {}, "RoFormer": {"embedding_size": 32},
    "Nystromformer": {},
    "DistilBert": {"dim": 32, "n_layers": 4, "n_heads": 2, "hidden_dim": 64},
    "SqueezeBert": {"embedding_size": 32}, "ConvBert": {"embedding_size": 32}, "MegatronBert": {}, "Longformer": {},
    "GPT2": {"n_embd": 32, "n_layer": 4, "n_head": 2, "pad_token_id": 0},
    "GPTNeoX": {"pad_token_id": 0}, "Llama": {"pad_token_id": 0},
    "Mistral": {"num_key_value_heads": 2, "pad_token_id": 0},
    "Bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    "ModernBert": {"pad_token_id": 0},
}
IMAGE_MODELS: dict[str, dict[str, object]] = {
    "ViT": {}, "DeiT": {}, "Beit": {}, "Dinov2": {"patch_size": 8}, "ConvNextV2": {"depths": [1, 1, 2, 1]},
    "ResNet": {"depths": [1, 1, 2, 1]}, "MobileNetV2": {}, "PoolFormer": {},
    "Segformer": {"num_attention_heads": [1, 2, 4, 8]},
    "Swin": {"embed_dim": 16, "window_size": 2, "depths": [1, 1, 2, 1], "num_attention_heads": [1, 2, 4, 8]},
}


def _hugging_face(name: str, task: str, more: dict[str, object]) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SMALL, **more})
    model: nn.Module = getattr(transformers, f"{name}For{task}Classification")(config)
    return model


def small_bert() -> nn.Module:
    """Return a classifier of texts whose tokens are ASCII."""
    return _hugging_face("Bert", "Sequence", {"vocab_size": 128})


def hugging_face_classifiers() -> Iterator[Specimen]:
    """Yield the sequence classifiers (with tokens and a mask) and image classifiers of transformers, in small sizes."""
    for name, more in TEXT_MODELS.items():
        settings = {"vocab_size": VOCABULARY, **more}
        yield Specimen(name, lambda name=name, more=settings: _hugging_face(name, "Sequence", more), text(LENGTH))
    for name, more in IMAGE_MODELS.items():
        settings = {"image_size": 64, **more}
        yield Specimen(name, lambda name=name, more=settings: _hugging_face(name, "Image", more),
                       image(64, "pixel_values"))


FAMILIES: dict[str, Callable[[], Iterator[Specimen]]] = {
    "torchvision": torchvision_classifiers, "timm": timm_classifiers, "hf": hugging_face_classifiers}
