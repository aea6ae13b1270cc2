"""Sample requests, which show what a handler passes to its model, and with which a new archive is checked."""

from __future__ import annotations

import base64
import binascii
import io
import json
import mimetypes
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from early_exit.archiver.packaging.sources.form import FormFile
from early_exit.handler.errors import ArchiveError
from early_exit.handler.sample_request import BODY, OCTETS, Part, SampleRequest

_SHAPES = ((3, 256, 256), (3, 320, 320))


def samples_of(files: Sequence[Path], content_type: str | None, form: Sequence[FormFile]) -> list[SampleRequest]:
    """Return the user's sample requests.

    Args:
        files: the bodies of requests.
        content_type: the content type of all bodies; by default the file names tell it.
        form: the parts of one more request; empty if there is none.

    Raises:
        ArchiveError: a file cannot be read.
    """
    samples = [SampleRequest((_part(BODY, file, content_type),)) for file in files]
    if form:
        samples.append(SampleRequest(tuple(_part(part.name, part.file, part.content_type) for part in form)))
    return samples


def _part(name: str, file: Path, content_type: str | None) -> Part:
    try:
        return Part(file.read_bytes(), content_type or mimetypes.guess_type(file.name)[0] or OCTETS, name)
    except OSError as error:
        raise ArchiveError(f"cannot read the sample request {file}: {error}") from error


def sample_images(shape: Sequence[int] | None = None) -> list[SampleRequest]:
    """Return two requests with an image each.

    Args:
        shape: a shape whose last two sizes are the height and width of both images; if it has one size only, the images
            are square. By default, the images have two sizes, for handlers that bring all images to one size.
    """
    shapes = _SHAPES if shape is None else (tuple(shape),) * 2
    return [SampleRequest((Part(_image(*shapes[number][-2:], inverted=number == 1), OCTETS, BODY),))
            for number in range(2)]


def varied(sample: SampleRequest) -> list[SampleRequest]:
    """Return a list with a request of the same kind and other content; empty if no such request can be made.

    If a request has several parts, the largest one that can be varied is varied. The others, which may be options, stay
    as they are.
    """
    for number in sorted(range(len(sample.parts)), key=lambda number: len(sample.parts[number].value), reverse=True):
        value = _varied_bytes(sample.parts[number].value)
        if value is not None:
            parts = list(sample.parts)
            parts[number] = replace(parts[number], value=value)
            return [SampleRequest(tuple(parts))]
    return []


def resized(sample: SampleRequest) -> list[SampleRequest]:
    """Return a list with a request whose images have another size; empty if no part of the request is an image."""
    images = [_varied_image(part.value, is_larger=True) for part in sample.parts]
    parts = tuple(part if image is None else replace(part, value=image) for part, image in zip(sample.parts, images))
    return [SampleRequest(parts)] if any(images) else []


def _image(height: int, width: int | None = None, *, inverted: bool) -> bytes:
    from PIL import Image, ImageOps

    image = Image.radial_gradient("L").convert("RGB").resize((width or height, height))
    return _saved(ImageOps.invert(image) if inverted else image, "PNG")


def _varied_bytes(value: bytes) -> bytes | None:
    image = _varied_image(value)
    if image is not None:
        return image
    try:
        text = value.decode()
    except UnicodeDecodeError:
        # The bytes may be numbers of four bytes each: return the same numbers in another order.
        words = [value[start:start + 4] for start in range(0, len(value), 4)]
        return b"".join(reversed(words)) if len(value) % 4 == 0 and words != words[::-1] else None
    try:
        content = json.loads(text)
    except ValueError:
        return _varied_text(text).encode()
    changed = _varied_json(content)
    return json.dumps(changed).encode() if changed != content else None


def _varied_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _varied_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        changed = [_varied_json(inner) for inner in value]
        return changed if changed != value else value[::-1]
    if isinstance(value, float):
        return value / 2 - 0.1
    if isinstance(value, int) and not isinstance(value, bool):
        return value - 1 if value > 1 else value  # it may be a count, or the number of a row in a table
    if isinstance(value, str):
        return _varied_base64(value) or _varied_text(value)
    return value


def _varied_base64(text: str) -> str | None:
    try:
        image = _varied_image(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return None
    return base64.b64encode(image).decode() if image else None


def _varied_text(text: str) -> str:
    words = text.split(" ")
    return " ".join([*words[1:], words[0]]) if len(set(words)) > 1 else f"{text} {text}"


def _varied_image(value: bytes, *, is_larger: bool = False) -> bytes | None:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(value)) as image:
            kind, mode = image.format, image.mode
            if kind is None:
                return None
            inverted = ImageOps.invert(ImageOps.mirror(image.convert("L" if mode in ("1", "L") else "RGB")))
            width, height = image.size
            if is_larger:
                inverted = inverted.resize((width + width // 4 + 1, height + height // 2 + 1))
            return _saved(inverted.convert(mode), kind)
    except Exception:  # each image format has its own errors, and most bodies are not images
        return None


def _saved(image: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
