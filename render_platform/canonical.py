"""Canonical bytes: the one JSON form that is hashed. See docs/formats.md and tests/vectors/.

- an object's fields stand in their schema's order, all of them, null written out;
- integers are exact and of any size; there are no floats;
- strings are UTF-8, not normalised, and escaped as JSON.stringify does; NUL and lone surrogates are refused;
- no spaces, no trailing newline.

A reader hashes the bytes that it received, and refuses bytes that are not the canonical form of what they say.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from render_platform.errors import Finding

MAX_DEPTH = 128
_UNFIT = re.compile(r"[\x00\ud800-\udfff]")


def encode(value: Mapping[str, Any]) -> bytes:
    """The canonical bytes of an object whose keys already stand in their order.

    Raises Finding on a float, NUL, lone surrogate, non-ASCII key or any type JSON does not have.
    """
    _refuse(value, "$")
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def decode(data: bytes) -> dict[str, Any]:
    """The object that `data` is the canonical form of; anything else raises Finding."""
    try:
        value = json.loads(data, object_pairs_hook=_unique, parse_float=_no_float, parse_constant=_no_float)
    except (ValueError, RecursionError) as error:
        raise Finding(f"not canonical JSON: {error}") from error
    if not isinstance(value, dict):
        raise Finding("not canonical JSON: the outermost value is not an object")
    if encode(value) != data:
        raise Finding("not canonical JSON: encoding what it says gives other bytes")
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_float(text: str) -> Any:
    raise ValueError(f"{text} is not an integer")


def _refuse(value: Any, where: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise Finding(f"nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, bool | int):
        return
    if isinstance(value, str):
        if not value.isprintable() and _UNFIT.search(value):
            raise Finding(f"{where} holds NUL or a lone surrogate")
    elif isinstance(value, dict | Mapping):
        for key, item in value.items():
            if not (isinstance(key, str) and key.isascii() and "\0" not in key):
                raise Finding(f"{where} has a key that is not ASCII")
            _refuse(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        for index, item in enumerate(value):
            _refuse(item, f"{where}[{index}]", depth + 1)
    else:
        raise Finding(f"{where} is a {type(value).__name__}, which canonical JSON does not have")


def digest_of(data: bytes) -> str:
    """SHA-256 in lower-case hex: the name of a blob, and of an entry in the one after it."""
    return hashlib.sha256(data).hexdigest()
