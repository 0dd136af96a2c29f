"""The pages of docs/spec, and their vectors: recomputed with hashlib and json, which share nothing with the library.

Each example of a page is saved under the name that stands before it, its commands run beside it, and they print what
the page says. `cryptography` checks signatures and pyarrow reads Parquet: neither is ours. The last tests hold the
library to the same vectors.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

CHECKOUT = Path(__file__).parents[1]
VECTORS: dict[str, Any] = json.loads((CHECKOUT / "tests/vectors/spec.json").read_text())
PARQUET = (CHECKOUT / "tests/vectors/spec.parquet").read_bytes()
PAGES = ("records", "batch", "entry", "attestation")
BLOCK = re.compile(r"^```(json|sh|python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def page(name: str) -> str:
    return (CHECKOUT / f"docs/spec/{name}.md").read_text()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tree(hashes: Sequence[bytes]) -> bytes:
    """MTH of RFC 6962, section 2.1, over leaf hashes."""
    if len(hashes) == 1:
        return hashes[0]
    split = 1
    while split * 2 < len(hashes):
        split *= 2
    return hashlib.sha256(b"\x01" + tree(hashes[:split]) + tree(hashes[split:])).digest()


def leaves(texts: Sequence[str]) -> list[bytes]:
    return [hashlib.sha256(b"\x00" + text.encode()).digest() for text in texts]


def hexes(hashes: Sequence[bytes]) -> list[str]:
    return [value.hex() for value in hashes]


def public_key(vkey: str) -> Ed25519PublicKey:
    """The key of a vkey, whose key id is recomputed."""
    name, key_id, encoded = vkey.split("+", 2)
    data = base64.b64decode(encoded, validate=True)
    assert data[:1] == b"\x01"
    assert hashlib.sha256(name.encode() + b"\n" + data).hexdigest()[:8] == key_id
    return Ed25519PublicKey.from_public_bytes(data[1:])


# The pages.


def files_of(text: str) -> dict[str, str]:
    """The examples of a page by the file name that the page gives each, before it."""
    found = {}
    for block in BLOCK.finditer(text):
        if block[1] == "json":
            names = re.findall(r"`([a-z]+\.jsonl?)`", text[: block.start()])
            found[names[-1]] = block[2] if names[-1].endswith("l") else block[2].removesuffix("\n")
    return found


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_print_what_it_says(name: str, tmp_path: Path) -> None:
    if "openssl" in page(name) and shutil.which("openssl") is None:
        pytest.skip(f"docs/spec/{name}.md NOT RUN: openssl is not installed")
    (tmp_path / "batch.parquet").write_bytes(PARQUET)
    for file, text in files_of(page(name)).items():
        (tmp_path / file).write_text(text)
    blocks = BLOCK.findall(page(name))
    ran = 0
    for (language, code), (after, expected) in pairwise(blocks):
        if language not in ("sh", "python"):
            continue
        assert after == "text", f"{name}.md: a command without what it prints"
        command = ["bash", "-euc", code] if language == "sh" else [sys.executable, "-Ic", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == expected.splitlines()
        ran += 1
    assert ran > 0


def test_the_examples_are_the_vectors() -> None:
    log, attestation = VECTORS["log"], VECTORS["attestation"]
    assert files_of(page("records")) == {"event.json": VECTORS["events"][0]}
    assert files_of(page("batch")) == {"rows.jsonl": "\n".join([*VECTORS["events"], ""])}
    assert files_of(page("entry")) == {"leaves.jsonl": "\n".join([*log["entries"], ""])}
    assert files_of(page("attestation")) == {"envelope.json": attestation["envelope"]}
    assert f"```text\n{log['checkpoint']}```" in page("entry")
    assert f"`{log['vkey']}`" in page("entry")
    proof = "\n".join(VECTORS["batch"]["proof_of_event_1"])
    assert f"```text\n{proof}\n```" in page("batch")


# The vectors, recomputed.


def test_records() -> None:
    names = None
    for text in VECTORS["events"]:
        assert json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")) == text
        fields = list(json.loads(text))
        assert fields == (names or fields)
        names = fields
    assert names is not None
    assert f"All {len(names)} fields" in page("records")
    assert hexes(leaves(VECTORS["events"])) == VECTORS["event_leaf_hashes"]


def test_batch() -> None:
    batch, events = VECTORS["batch"], [json.loads(text) for text in VECTORS["events"]]
    assert (sha256(PARQUET), len(PARQUET)) == (batch["parquet_sha256"], batch["parquet_size"])
    assert tree(leaves(VECTORS["events"])).hex() == batch["merkle_root"]
    assert (len(events), sum(event["gpu_time_ns"] for event in events)) == (batch["records"], batch["gpu_time_ns"])
    ids = [event["event_id"] for event in events]
    assert ids == sorted(set(ids))
    first, second = (bytes.fromhex(node) for node in batch["proof_of_event_1"])
    below = hashlib.sha256(b"\x01" + first + leaves(VECTORS["events"])[1]).digest()
    assert sha256(b"\x01" + below + second) == batch["merkle_root"]


def test_the_rows_of_the_parquet_file_are_the_records() -> None:
    table = pq.read_table(pa.BufferReader(PARQUET))
    rows = [json.loads(text) for text in VECTORS["events"]]
    assert table.column_names == list(rows[0])
    for name in table.column_names:
        column = table.column(name)
        values = column.cast(pa.int64()).to_pylist() if pa.types.is_timestamp(column.type) else column.to_pylist()
        plain = [value.hex() if isinstance(value, bytes) else value for value in values]
        shown = [str(value) if name.endswith("_id") else value for value in plain]
        assert shown == [row[name] for row in rows], name


def test_entries() -> None:
    log, batch = VECTORS["log"], VECTORS["batch"]
    previous = "0" * 64
    for text, digest in zip(log["entries"], log["entry_digests"], strict=True):
        entry = json.loads(text)
        assert json.dumps(entry, ensure_ascii=False, separators=(",", ":")) == text
        assert (entry["previous"], sha256(text.encode())) == (previous, digest)
        assert f"{len(entry)} fields" in page("entry")
        previous = digest
    assert hexes(leaves(log["entries"])) == log["leaf_hashes"]
    assert tree(leaves(log["entries"])).hex() == log["root"]
    bundle = b"".join(len(text.encode()).to_bytes(2, "big") + text.encode() for text in log["entries"])
    assert sha256(bundle) == log["bundle_sha256"]
    first = json.loads(log["entries"][0])
    bound = {
        "batch_id": batch["batch_id"],
        "subject_digest": batch["parquet_sha256"],
        "subject_size": batch["parquet_size"],
        "records": batch["records"],
        "gpu_time_ns": batch["gpu_time_ns"],
        "merkle_root": batch["merkle_root"],
        "attestation": VECTORS["attestation"]["sha256"],
    }
    assert {name: first[name] for name in bound} == bound


def test_the_checkpoint() -> None:
    log = VECTORS["log"]
    text, _, line = log["checkpoint"].rpartition("\n\n")
    origin, size, root = text.split("\n")
    name, key_id, _ = log["vkey"].split("+", 2)
    assert (origin, size, base64.b64decode(root).hex()) == (name, "3", log["root"])
    dash, signer, encoded = line.removesuffix("\n").split(" ")
    signature = base64.b64decode(encoded, validate=True)
    assert (dash, signer, signature[:4].hex()) == ("—", name, key_id)
    public_key(log["vkey"]).verify(signature[4:], (text + "\n").encode())


def test_the_attestation() -> None:
    attestation, batch = VECTORS["attestation"], VECTORS["batch"]
    assert sha256(attestation["envelope"].encode()) == attestation["sha256"]
    envelope = json.loads(attestation["envelope"])
    payload = base64.b64decode(envelope["payload"], validate=True)
    (signature,) = envelope["signatures"]
    kind = envelope["payloadType"].encode()
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    assert signature["keyid"] == attestation["vkey"]
    public_key(signature["keyid"]).verify(base64.b64decode(signature["sig"], validate=True), signed)
    statement = json.loads(payload)
    assert statement["subject"] == [{"name": batch["batch_id"], "digest": {"sha256": batch["parquet_sha256"]}}]
    predicate = statement["predicate"]
    for name in predicate:
        assert re.search(rf"^\|.*`{name}`.*\|", page("attestation"), re.MULTILINE), f"{name} is not in the table"
    for name, total in (("events", batch["records"]), ("gpu_time_ns", batch["gpu_time_ns"])):
        assert predicate[name] == sum(one[name] for one in predicate["resources"]) == total


# The library says the same.


def test_the_library_writes_the_vectors() -> None:
    from render_platform import batches, entries, events, note, tiles
    from tests.stories import signer

    log, attestation, batch = VECTORS["log"], VECTORS["attestation"], VECTORS["batch"]
    table = batches.decode(PARQUET)
    assert [row.decode() for row in events.canonical_rows(table)] == VECTORS["events"]
    assert events.merkle_root(table).hex() == batch["merkle_root"]
    attester = signer("example.com/log/attestation", 2)
    made = batches.attest(batch["batch_id"], batch["parquet_sha256"], table, attester, "render-platform/0.1.0")
    assert (made.decode(), attester.verifier.vkey) == (attestation["envelope"], attestation["vkey"])
    assert [entries.parse(text.encode()).to_bytes().decode() for text in log["entries"]] == log["entries"]
    assert sha256(tiles.encode_bundle([text.encode() for text in log["entries"]])) == log["bundle_sha256"]
    by = signer("example.com/log", 1)
    checkpoint = note.Checkpoint("example.com/log", 3, bytes.fromhex(log["root"]))
    assert note.sign_note(checkpoint.text(), [by]) == log["checkpoint"]


def test_a_statement_without_resources_is_as_good_as_ever() -> None:
    """What was signed before a field was added stays valid."""
    from render_platform import batches
    from tests.platforms import scalar_json
    from tests.stories import signer

    attester = signer("example.com/log/attestation", 2)
    statement = json.loads(base64.b64decode(json.loads(VECTORS["attestation"]["envelope"])["payload"]))
    del statement["predicate"]["resources"]
    payload = scalar_json(statement).encode()
    kind = batches.PAYLOAD_TYPE
    signature = attester.sign(b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload))
    older = {
        "payloadType": kind,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": attester.verifier.vkey, "sig": base64.b64encode(signature).decode()}],
    }
    keys = {attester.verifier.vkey: attester.verifier}
    digest = VECTORS["batch"]["parquet_sha256"]
    assert batches.check_attestation(scalar_json(older).encode(), digest, keys) == statement["predicate"]
