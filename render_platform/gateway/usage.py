"""What a request for pictures asks for, read from the names that such requests usually use.

`num_inference_steps`, `num_steps` or `steps`; `num_images_per_prompt`, `num_images` or `n`; `width` and `height`, or
`size` as `1024x1024`. What is not there, or is no such number, is unknown. It is what was asked for, not what was done.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from render_platform.gateway.backends import Usage
from render_platform.gateway.catalogue import ModelSpec

MAX_NUMBER = 999_999
PICTURES = ("image", "video")
"""Modalities whose requests are counted in steps and pictures."""

_STEPS = ("num_inference_steps", "num_steps", "steps")
_IMAGES = ("num_images_per_prompt", "num_images", "n")
_SIZE = re.compile(rb'"([0-9]{1,6}x[0-9]{1,6})"')
_NUMBER = re.compile(rb"[0-9]{1,6}")
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def usage_of_request(model: ModelSpec, body: bytes) -> Usage:
    """Steps, images and dimensions that `body` asks of a model of pictures; nothing of any other model."""
    if model.modality not in PICTURES:
        return Usage()
    try:
        fields = _fields.decode(body)
    except (ValueError, RecursionError):
        return Usage()
    size = _SIZE.fullmatch(bytes(fields.get("size", b"")))
    width, height = _number(fields, "width"), _number(fields, "height")
    dims = f"{width}x{height}" if width and height else size[1].decode() if size else None
    return Usage(input_dims=dims, num_steps=_number(fields, *_STEPS), image_count=_number(fields, *_IMAGES))


def _number(fields: Mapping[str, msgspec.Raw], *names: str) -> int | None:
    """The first of these fields that is a whole number of at most MAX_NUMBER."""
    for name in names:
        if _NUMBER.fullmatch(text := bytes(fields.get(name, b""))):
            return int(text)
    return None
