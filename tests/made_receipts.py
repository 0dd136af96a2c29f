"""Receipts built by docs/spec/receipt.md, with hashlib, json and cryptography alone: no code of the library's."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.platforms import scalar_json, tree_hash

ORIGIN = "example.com/log"


@dataclass
class Key:
    name: str
    kind: int = 1
    private: Ed25519PrivateKey = field(default_factory=lambda: Ed25519PrivateKey.from_private_bytes(bytes(32)))

    @property
    def data(self) -> bytes:
        return bytes([self.kind]) + self.private.public_key().public_bytes_raw()

    @property
    def key_id(self) -> bytes:
        return hashlib.sha256(self.name.encode() + b"\n" + self.data).digest()[:4]

    @property
    def vkey(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{encoded(self.data)}"

    def line(self, text: str, time_s: int = 0) -> str:
        if self.kind == 1:
            signature = self.private.sign(text.encode())
        else:
            signed = f"cosignature/v1\ntime {time_s}\n{text}".encode()
            signature = time_s.to_bytes(8, "big") + self.private.sign(signed)
        return f"— {self.name} {encoded(self.key_id + signature)}\n"


def other_key(name: str, kind: int = 1) -> Key:
    return Key(name, kind, Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"{name}{kind}".encode()).digest()))


LOG, SEER = Key(ORIGIN), other_key("witness.example", 4)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def path(index: int, leaves: Sequence[bytes]) -> list[bytes]:
    """PATH of RFC 6962, section 2.1.1, as it is written there."""
    if len(leaves) == 1:
        return []
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    if index < split:
        return [*path(index, leaves[:split]), tree_hash(leaves[split:])]
    return [*path(index - split, leaves[split:]), tree_hash(leaves[:split])]


@dataclass
class Made:
    """A receipt in its parts; `text()` puts them together."""

    extra: dict[str, Any]
    index: int
    proof: list[str]
    body: str
    signatures: str

    def text(self) -> str:
        lines = ["c2sp.org/tlog-proof@v1", f"extra {encoded(scalar_json(self.extra).encode())}", f"index {self.index}"]
        return "\n".join([*lines, *self.proof, "", self.body, self.signatures])

    @classmethod
    def of(cls, text: str) -> Made:
        head, body, signatures = text.split("\n\n")
        lines = head.split("\n")
        extra = json.loads(base64.b64decode(lines[1].split(" ")[1]))
        return cls(extra, int(lines[2].split(" ")[1]), lines[3:], body + "\n", signatures)


def make(
    rows: int = 5, at: int = 2, size: int = 7, index: int = 3, event: Any = None, entry: Any = None, **extra: Any
) -> Made:
    """A receipt for row `at` of `rows`, entry `index` of `size`; `event` and `entry` change what is hashed."""
    ref = hashlib.sha256(b"render-platform/customer/v1\n" + bytes(32) + b"someone").hexdigest()
    text = scalar_json({"event_id": "e", "customer_ref": ref, "gpu_time_ns": 7, "schema_version": 1} | (event or {}))
    leaves = [b"row %d" % n for n in range(rows)]
    leaves[at] = text.encode()
    fields = {"version": 1, "type": "usage_batch", "batch_id": "b", "records": rows}
    entry_text = scalar_json(fields | {"merkle_root": tree_hash(leaves).hex()} | (entry or {}))
    erasure_text = scalar_json({"version": 1, "type": "erasure", "batch_id": ref})
    entries = [erasure_text.encode() for _ in range(size)]
    entries[index] = entry_text.encode()
    values = {
        "version": 1,
        "entry": entry_text,
        "event": text,
        "event_index": at,
        "event_proof": [node.hex() for node in path(at, leaves)],
        "opening": {"customer_id": "someone", "salt": "00" * 32},
        "erasure": None,
    }
    body = f"{ORIGIN}\n{size}\n{encoded(tree_hash(entries))}\n"
    proof = [encoded(node) for node in path(index, entries)]
    made = Made(values | extra, index, proof, body, LOG.line(body) + SEER.line(body, 1_700_000_000))
    if made.extra["erasure"] == "proven":
        erased = (index + 1) % size
        nodes = [node.hex() for node in path(erased, entries)]
        made.extra["erasure"] = {"entry": erasure_text, "index": erased, "proof": nodes}
    return made
