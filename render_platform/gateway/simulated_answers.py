"""What a simulated backend answers: pure functions of a digest and of sizes, and valid as what they claim to be."""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import msgspec

VECTOR_SIZE = 16
PICTURE_SIDE = 8
"""Pixels; every picture is a square of one colour."""

_SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wu", "za")


def words(digest: bytes, count: int) -> list[str]:
    """`count` tokens of gibberish, each one word; all but the first begin with a space."""
    found = []
    for number in range(count):
        drawn = hashlib.sha256(digest + number.to_bytes(4, "big")).digest()
        word = "".join(_SYLLABLES[byte % 16] for byte in drawn[: 1 + drawn[31] % 3])
        found.append(word if number == 0 else f" {word}")
    return found


def vector(text: str) -> list[float]:
    """An embedding of length 1; equal texts have equal ones."""
    drawn = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    numbers = [byte - 127.5 for byte in drawn[:VECTOR_SIZE]]
    length = sum(number * number for number in numbers) ** 0.5
    return [round(number / length, 6) for number in numbers]


def png(digest: bytes) -> bytes:
    """A PNG in the colour of the digest's first three bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", PICTURE_SIDE, PICTURE_SIDE, 8, 2, 0, 0, 0)
    rows = (b"\0" + digest[:3] * PICTURE_SIDE) * PICTURE_SIDE
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def jpeg(digest: bytes) -> bytes:
    """A grey baseline JPEG of one block. Its tables hold one code each, `0`: a 7-bit DC value, and the block's end."""

    def segment(marker: int, data: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data

    one_code = bytes([1] + [0] * 15)
    level = 64 | digest[0] % 64  # 7 bits, the first one set: a positive value of this category
    bits = level << 8 | 0x7F  # 0 (the category), seven bits, 0 (the end), and ones to fill up
    return b"".join(
        (
            b"\xff\xd8",
            segment(0xDB, b"\0" + bytes([8]) * 64),
            segment(0xC0, struct.pack(">BHHBBBB", 8, PICTURE_SIDE, PICTURE_SIDE, 1, 1, 0x11, 0)),
            segment(0xC4, b"\x00" + one_code + b"\x07"),
            segment(0xC4, b"\x10" + one_code + b"\x00"),
            segment(0xDA, bytes([1, 1, 0, 0, 63, 0])),
            bits.to_bytes(2, "big"),
            b"\xff\xd9",
        )
    )


def usage(input_tokens: int, output_tokens: int) -> dict[str, int]:
    total = input_tokens + output_tokens
    return {"prompt_tokens": input_tokens, "completion_tokens": output_tokens, "total_tokens": total}


@dataclass(frozen=True, slots=True)
class Text:
    """An answer to `chat` or `completion`, whole or in pieces, as OpenAI's API shapes it."""

    task: str
    digest: bytes
    model: str
    created: int
    streamed: bool

    def whole(self, text: str, finish: str, usage: dict[str, int]) -> bytes:
        said = {"text": text} if self._is_completion else {"message": {"role": "assistant", "content": text}}
        return self._encode([{"index": 0, **said, "finish_reason": finish}], {"usage": usage})

    def piece(self, text: str, finish: str | None = None) -> bytes:
        """A chunk of a stream; the last one has no text and says why it ends."""
        delta = {"role": "assistant", "content": text} if finish is None else {}
        said = {"text": text} if self._is_completion else {"delta": delta}
        return self._encode([{"index": 0, **said, "finish_reason": finish}], {})

    def usage(self, usage: dict[str, int]) -> bytes:
        """The chunk that `include_usage` asks for."""
        return self._encode([], {"usage": usage})

    @property
    def _is_completion(self) -> bool:
        return self.task == "completion"

    def _encode(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        kind = "text_completion" if self._is_completion else "chat.completion"
        around = {
            "id": ("cmpl-" if self._is_completion else "chatcmpl-") + self.digest.hex()[:24],
            "object": kind + ".chunk" if self.streamed and not self._is_completion else kind,
            "created": self.created,
            "model": self.model,
        }
        return msgspec.json.encode({**around, "choices": choices, **more})
