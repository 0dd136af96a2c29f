"""Verifies a receipt: offline, with public keys, Python's standard library and `cryptography`. Nothing else is needed:

    python receipt_verifier.py FILE --key VKEY [--witness VKEY] [--json]

- What is reported as proven hashes to a root that a given key has signed; the rest of a receipt is only material.
- A receipt has one form: text that differs from it in any way is refused, with the one error InvalidReceipt.
- Keys are C2SP vkeys, and never taken from the receipt. Signatures of unknown keys are ignored.
- Exit codes: 0 proven, 1 not, 2 the arguments cannot be used. Formats: docs/spec/receipt.md.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

HEADER = "c2sp.org/tlog-proof@v1"
MAX_RECEIPT_BYTES = 512 * 1024
MAX_SIGNATURES = 100
MAX_TIME_S = 253_402_300_799
CUSTOMER_CONTEXT = b"render-platform/customer/v1\n"
LOG_KEY, WITNESS_KEY = 0x01, 0x04
_EXTRA = ("version", "entry", "event", "event_index", "event_proof", "opening", "erasure")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)
_NAME = re.compile(r"[^\s+]+")
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


class InvalidReceipt(Exception):
    """The receipt proves nothing: it is malformed, or something in it is not what was signed."""


class InvalidKey(Exception):
    """What was given as a key is none."""


class Proven(NamedTuple):
    """What a receipt proves. `event` and `entry` are hashed as a whole; times are microseconds UTC.

    `identity` is "opened" (`customer_id` is whom the event's reference stands for), "not opened" or "identity erased".
    `signed_by` names the log's keys, `witnesses` those that cosigned, each with its time in seconds since 1970.
    """

    identity: str
    customer_id: str | None
    event: dict[str, Any]
    event_index: int
    batch_id: str
    entry: dict[str, Any]
    entry_index: int
    tree_size: int
    root: str
    origin: str
    signed_by: tuple[str, ...]
    witnesses: dict[str, int]


class _Key(NamedTuple):
    vkey: str
    name: str
    key_id: bytes
    kind: int
    public: bytes


class _Tree(NamedTuple):
    size: int
    root: bytes

    def prove(self, text: str, index: Any, proof: Any, what: str) -> None:
        """InvalidReceipt unless `text` is leaf `index`, by a list of hashes in hex (RFC 9162, 2.1.3.2)."""
        if type(index) is not int or not 0 <= index < self.size or not isinstance(proof, list):
            raise InvalidReceipt(f"{what}: the index is not one of the tree, or the proof no list")
        found, first, last = hashlib.sha256(b"\x00" + text.encode()).digest(), index, self.size - 1
        for node in (_digest(node, "a node of a proof") for node in proof):
            if last == 0:
                raise InvalidReceipt(f"{what}: the proof is too long")
            if first & 1 or first == last:
                found = hashlib.sha256(b"\x01" + node + found).digest()
                while first and not first & 1:
                    first, last = first >> 1, last >> 1
            else:
                found = hashlib.sha256(b"\x01" + found + node).digest()
            first, last = first >> 1, last >> 1
        if last != 0 or found != self.root:
            raise InvalidReceipt(f"{what}: it does not hash to the root")


def verify_receipt(receipt: str | bytes, vkeys: list[str], witnesses: list[str] | None = None) -> Proven:
    """What `receipt` proves, if one of `vkeys` (log keys) signed its checkpoint; InvalidReceipt otherwise.

    `witnesses` are vkeys of type 0x04; those that cosigned are reported. InvalidKey where a vkey is none.
    """
    keys = [_parse_key(vkey, LOG_KEY) for vkey in vkeys]
    witness_keys = [_parse_key(vkey, WITNESS_KEY) for vkey in witnesses or []]
    extra, index, proof, (origin, size, root, _, *lines) = _parse(_text(receipt))
    log = _Tree(_number(size), _base64(root, "the root", 32))
    times = _signatures(lines, f"{origin}\n{size}\n{root}\n", keys + witness_keys)
    signed_by = tuple(key.vkey for key in keys if key.vkey in times and key.name == origin)
    if not signed_by:
        raise InvalidReceipt("the checkpoint is not signed by a given key that has its origin as name")
    entry, event = _object(extra["entry"], "the entry"), _object(extra["event"], "the event")
    log.prove(extra["entry"], index, proof, "the entry")
    batch_id, records = entry.get("batch_id"), entry.get("records")
    kind = entry.get("version"), entry.get("type")
    if kind != (1, "usage_batch") or not isinstance(batch_id, str) or type(records) is not int:
        raise InvalidReceipt("the entry is not that of a batch")
    batch = _Tree(records, _digest(entry.get("merkle_root"), "the entry's merkle_root"))
    batch.prove(extra["event"], extra["event_index"], extra["event_proof"], "the event")
    if event.get("schema_version") != 1 or any(isinstance(value, dict | list) for value in event.values()):
        raise InvalidReceipt("the event is not one of schema version 1")
    return Proven(
        *_identity(extra, event, log),
        event=event,
        event_index=extra["event_index"],
        batch_id=batch_id,
        entry=entry,
        entry_index=index,
        tree_size=log.size,
        root=log.root.hex(),
        origin=origin,
        signed_by=signed_by,
        witnesses={key.vkey: times[key.vkey] for key in witness_keys if key.vkey in times},
    )


def _text(receipt: str | bytes) -> str:
    try:
        data = receipt.encode() if isinstance(receipt, str) else receipt
        text = data.decode() if len(data) <= MAX_RECEIPT_BYTES else ""
    except UnicodeError as error:
        raise InvalidReceipt("the receipt is not UTF-8") from error
    if _CONTROL.search(text) or not text.endswith("\n"):
        raise InvalidReceipt(f"the receipt is not lines of text of at most {MAX_RECEIPT_BYTES} bytes")
    return text


def _parse(text: str) -> tuple[dict[str, Any], int, list[str], list[str]]:
    """The extra data, the entry's index, its proof in hex, and the lines of the checkpoint's note."""
    head, _, note = text.partition("\n\n")
    lines, noted = head.split("\n"), note.split("\n")[:-1]
    if len(lines) < 3 or lines[0] != HEADER or not lines[1].startswith("extra ") or not lines[2].startswith("index "):
        raise InvalidReceipt("not a receipt: it does not begin with the header, extra and index")
    if not 5 <= len(noted) <= 4 + MAX_SIGNATURES or not noted[0] or noted[3]:
        raise InvalidReceipt("the checkpoint is not origin, size and root, a blank line and signatures")
    extra = _object(_base64(lines[1].removeprefix("extra "), "the extra line"), "the extra data")
    if tuple(extra) != _EXTRA or extra["version"] is True or extra["version"] != 1:
        raise InvalidReceipt("the extra data does not have the fields of a receipt of version 1")
    proof = [_base64(line, "a line of the proof", 32).hex() for line in lines[3:]]
    return extra, _number(lines[2].removeprefix("index ")), proof, noted


def _signatures(lines: list[str], text: str, keys: list[_Key]) -> dict[str, int]:
    """The vkeys of those of `keys` that signed `text`, with a witness's time (0 for log keys)."""
    found: dict[str, int] = {}
    for line in lines:
        name, _, encoded = line.removeprefix("— ").partition(" ")
        data = _base64(encoded, "a signature")
        if not line.startswith("— ") or not _NAME.fullmatch(name) or len(data) <= 4:
            raise InvalidReceipt("a signature line is malformed")
        for key in keys:
            if (key.name, key.key_id) == (name, data[:4]):
                found[key.vkey] = _time_of(key, data[4:], text)
    return found


def _time_of(key: _Key, signature: bytes, text: str) -> int:
    """When a known key signed, as far as it says so. Its bad signature refuses the whole receipt."""
    time_s, signed = 0, text.encode()
    if key.kind == WITNESS_KEY:
        time_s, signature = int.from_bytes(signature[:8], "big"), signature[8:]
        signed = b"cosignature/v1\ntime %d\n" % time_s + signed
    try:
        Ed25519PublicKey.from_public_bytes(key.public).verify(signature, signed)
    except InvalidSignature:
        raise InvalidReceipt(f"the signature of {key.name} is wrong") from None
    if time_s > MAX_TIME_S:
        raise InvalidReceipt(f"the time of {key.name} is out of range")
    return time_s


def _identity(extra: dict[str, Any], event: dict[str, Any], log: _Tree) -> tuple[str, str | None]:
    """Who: the opening must hash to the event's reference, or an erasure of the reference must stand in the log."""
    ref, opening, erasure = event.get("customer_ref"), extra["opening"], extra["erasure"]
    if opening is None and erasure is None:
        return "not opened", None
    if erasure is None:
        customer_id, salt = _fields(opening, "the opening", "customer_id", "salt")
        hashed = CUSTOMER_CONTEXT + _digest(salt, "the salt") + str(customer_id).encode()
        if not isinstance(customer_id, str) or hashlib.sha256(hashed).hexdigest() != ref:
            raise InvalidReceipt("the opening is not that of the event's customer")
        return "opened", customer_id
    text, index, proof = _fields(erasure, "the erasure", "entry", "index", "proof")
    entry = _object(text, "the erasure")
    log.prove(text, index, proof, "the erasure")
    if opening is not None or (entry.get("type"), entry.get("batch_id")) != ("erasure", ref):
        raise InvalidReceipt("the erasure is not that of the event's customer, or an opening stands beside it")
    return "identity erased", None


def _fields(value: Any, what: str, *names: str) -> list[Any]:
    if not isinstance(value, dict) or tuple(value) != names:
        raise InvalidReceipt(f"{what} does not have the fields {', '.join(names)}")
    return list(value.values())


def _object(text: Any, what: str) -> dict[str, Any]:
    """The object that `text` is the canonical JSON of. What stands twice, or escaped otherwise, encodes otherwise."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, parse_float=int, parse_constant=int)  # which refuse what is no integer
        good = json.dumps(value, ensure_ascii=False, separators=(",", ":")) == text and not _NUL.search(text)
    except (ValueError, TypeError, RecursionError):
        good = False
    if not good or not isinstance(value, dict):
        raise InvalidReceipt(f"{what} is not the canonical JSON of an object")
    return value


def _digest(value: Any, what: str) -> bytes:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise InvalidReceipt(f"{what} is not 64 hexadecimal digits")
    return bytes.fromhex(value)


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise InvalidReceipt(f"{text[:20]!r} is not a number of at most 18 digits")
    return int(text)


def _base64(text: str, what: str, size: int | None = None) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise InvalidReceipt(f"{what} is not base64") from error
    if base64.b64encode(data).decode() != text or size not in (None, len(data)):
        raise InvalidReceipt(f"{what} is not base64 in its one form, or not of its length")
    return data


def _parse_key(vkey: str, kind: int) -> _Key:
    """The key of `name+hex(key id)+base64(kind || public)`."""
    name, _, rest = vkey.partition("+")
    try:
        data = _base64(rest.partition("+")[2], "the key", 33)
    except InvalidReceipt:
        data = b"\0"
    key_id = hashlib.sha256(name.encode(errors="replace") + b"\n" + data).digest()[:4]
    if data[0] != kind or not _NAME.fullmatch(name) or not rest.startswith(f"{key_id.hex()}+"):
        raise InvalidKey(f"not a verifier key of type 0x{kind:02x}: give <name>+<key id>+<base64>")
    return _Key(vkey, name, key_id, kind, data[1:])


def _say(proven: Proven) -> str:
    """For a person. Text is escaped, as a customer may have chosen it."""
    lines = [
        "proven: this usage event stands in the signed log",
        f"  who        {proven.identity if proven.customer_id is None else json.dumps(proven.customer_id)}",
        f"  batch      {json.dumps(proven.batch_id)}, event {proven.event_index} of {proven.entry['records']}",
        f"  log        {proven.origin}, entry {proven.entry_index} of {proven.tree_size}",
        *(f"  signed by  {vkey}" for vkey in proven.signed_by),
        *(f"  witness    {vkey}, {datetime.fromtimestamp(s, UTC).isoformat()}" for vkey, s in proven.witnesses.items()),
        *([] if proven.witnesses else ["  witness    unwitnessed"]),
        *(f"  {name:<18} {json.dumps(value)}" for name, value in proven.event.items()),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="receipt_verifier", description="Verify a receipt, offline.")
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--key", action="append", required=True, metavar="VKEY", help="a key of the log; repeatable")
    parser.add_argument("--witness", action="append", default=[], metavar="VKEY", help="a witness's key; repeatable")
    parser.add_argument("--json", action="store_true", help="say what is proven as JSON")
    given = parser.parse_args(arguments)
    try:
        with given.file.open("rb") as file:
            proven = verify_receipt(file.read(MAX_RECEIPT_BYTES + 1), given.key, given.witness)
    except (OSError, InvalidKey, InvalidReceipt) as error:
        sys.stderr.write(f"not proven: {error}\n")
        return 1 if isinstance(error, InvalidReceipt) else 2
    said = json.dumps({"verified": True, "witnessed": bool(proven.witnesses), **proven._asdict()}, indent=1) + "\n"
    sys.stdout.write(said if given.json else _say(proven))
    return 0


if __name__ == "__main__":
    sys.exit(main())
