"""Traffic of declining quality: blur, noise and low contrast, applied to image requests."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

KINDS = ("blur", "noise", "contrast")


def corrupted(body: bytes, kind: str, strength: float, seed: int = 0) -> bytes:
    """Return an image request after a corruption, as a PNG.

    Args:
        body: an encoded image.
        kind: the kind of corruption: blur, noise or contrast.
        strength: the radius of blur in pixels, the standard deviation of noise for pixels in [0, 1], or the share by
            which contrast moves pixels to the image's mean. 0 changes nothing.
        seed: the seed of the noise.
    """
    image = Image.open(io.BytesIO(body))
    if kind == "blur":
        image = image.filter(ImageFilter.GaussianBlur(strength))
    else:
        pixels = np.asarray(image).astype(np.float64) / 255
        if kind == "noise":
            pixels = pixels + strength * np.random.default_rng(seed).standard_normal(pixels.shape)
        elif kind == "contrast":
            pixels = pixels.mean() + (1 - strength) * (pixels - pixels.mean())
        else:
            raise ValueError(f"expected one of {KINDS}, found {kind!r}")
        image = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
