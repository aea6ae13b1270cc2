"""Habits of TorchServe's own examples: images, detectors, and texts with a model of transformers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, BertTokenizerFast

from early_exit.handler.errors import Unsupported
from tests.support.detector import images
from tests.support.habits.habit import Ask, Habit, UsersFiles, instance, made, state_dict

LENGTH = 16
WORDS = ("a", "good", "bad", "film", "plot", "song", "was", "very", "not", "really", "and", "the", "boring",
         "wonderful", "it", "all", "time", "actor", "ending", "music", "slow", "quick")
TEXTS = ("a wonderful film", "boring", "the plot was slow and the ending was bad", "very good music",
         "not a good song", "it was really wonderful all the time", "the actor was not bad", "quick")


def png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    to_pil_image((image * 255).round().byte()).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(side: int) -> list[bytes]:
    """Return images of coloured patches with high and low contrast in turn, around a grey that is normalised to 0."""
    grey = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    patches = images(8, (3, side, side), seed=3)
    return [png((grey + (patch - patch.mean()) * contrast).clamp(0, 1))
            for patch, contrast in zip(patches, (3.0, 0.02, 2.0, 0.05, 1.0, 0.01, 3.0, 0.3))]


def photo_net() -> nn.Module:
    return made("photo_net.py", torch.randn(32, 3, 224, 224, generator=torch.Generator().manual_seed(8)))


def photo_followers(model: Any) -> Sequence[Sequence[nn.Linear]]:
    return [[model.hidden[0], model.widened[0], model.classifier], [model.widened[0], model.classifier]]


def with_names(model: nn.Module, folder: Path) -> UsersFiles:
    names = {str(number): name for number, name in enumerate(("cat", "dog", "bird", "fish", "ant"))}
    (folder / "index_to_name.json").write_text(json.dumps(names))
    return UsersFiles(state_dict(model, folder).serialized, (folder / "index_to_name.json",))


@torch.no_grad()
def sure_detector(model_file: str) -> nn.Module:
    """Return a detector that detects objects without having been trained."""
    model: Any = instance(model_file)
    model.roi_heads.box_predictor.cls_score.weight *= 30
    return model  # type: ignore[no-any-return]


def bert_config() -> BertConfig:
    return BertConfig(vocab_size=5 + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=64, max_position_embeddings=LENGTH, num_labels=2,
                      id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})


@torch.no_grad()
def bert() -> nn.Module:
    """Return a BERT with two layers, of which the second changes nothing, and with a pooler that is almost linear."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert_config()).eval()
    for part in (model.bert.encoder.layer[1].attention.output.dense, model.bert.encoder.layer[1].output.dense):
        part.weight.zero_()  # only normalisations of normalised values are left
        part.bias.zero_()
    model.bert.embeddings.word_embeddings.weight *= 50
    model.bert.encoder.layer[0].attention.output.dense.weight *= 100  # makes the first token depend on others
    model.bert.pooler.dense.weight.normal_(std=SMALL / 6)
    model.classifier.weight.normal_(std=0.5 / SMALL)
    return model


def bert_followers(model: Any) -> Sequence[Sequence[nn.Linear]]:
    """Return the linear layer on all tokens to which pooler and classifier reduce where tanh is the identity."""
    both = nn.Linear(LENGTH * 32, 2)
    pooler, classifier = model.bert.pooler.dense, model.classifier
    with torch.no_grad():
        both.weight.zero_()
        both.weight[:, :32] = classifier.weight @ pooler.weight
        both.bias.copy_(classifier.weight @ pooler.bias + classifier.bias)
    return [[both]]


def pretrained(model: Any, folder: Path) -> UsersFiles:
    """Write the files that save_pretrained writes for a model and its tokenizer."""
    model.save_pretrained(folder / "model")
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder / "model")
    return UsersFiles(extra=tuple(sorted((folder / "model").iterdir())))


SMALL = 1e-3
"""The magnitude of the inputs of the pooler's tanh."""
PICTURES = tuple(Ask(body) for body in pictures(256))
BERT_ASKS = tuple(Ask(text.encode(), "text/plain" if number % 2 else "") for number, text in enumerate(TEXTS))
SCENES = tuple(Ask(png(image)) for image in images(8, (3, 96, 96), seed=4))

EXAMPLES = (
    Habit("image_classifier", "image_classifier", photo_net, PICTURES + tuple(
        Ask(ask.body, explain=True) for ask in PICTURES[:2]), "photo_net.py", write=with_names,
        followers=photo_followers),
    Habit("mnist", "digit_handler.py", lambda: made("digit_net.py", torch.randn(32, 1, 28, 28)), PICTURES,
          "digit_net.py", followers=lambda model: [[model.hidden[0], model.classifier]], thresholds=(0.8,)),
    Habit("video_frames", "frames_handler.py", photo_net, tuple(
        Ask(json.dumps({"image": base64.b64encode(body).decode()}).encode(), "application/json" if number % 2 else "")
        for number, body in enumerate(pictures(96))), "photo_net.py", followers=photo_followers),
    Habit("faster_rcnn", "object_detector", partial(sure_detector, "small_faster_rcnn.py"), SCENES,
          "small_faster_rcnn.py"),
    Habit("bert", "sequence_classifier.py", bert, BERT_ASKS + tuple(
        Ask(text.encode(), explain=True) for text in TEXTS[:2]), write=pretrained, followers=bert_followers,
        thresholds=(0.8,)),
    Habit("question_answering", "question_answering.py", lambda: BertForQuestionAnswering(bert_config()), BERT_ASKS,
          write=pretrained, refusal=Unsupported.SEVERAL_SCORES),
)
