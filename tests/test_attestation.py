"""A batch's attestation, checked against the text of DSSE with `cryptography` alone."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from render_platform import batches
from render_platform.errors import Finding
from render_platform.note import FileSigner
from tests.factories import make_events, make_table
from tests.platforms import make_platform, read_blob, read_log, record_random, scalar_json

SIGNER = FileSigner("example.com/attestation", Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = FileSigner("example.com/attestation", Ed25519PrivateKey.from_private_bytes(bytes(32)))
KEYS = {SIGNER.verifier.vkey: SIGNER.verifier}
DIGEST = "ab" * 32


def attested() -> bytes:
    return batches.attest("2023-11-16T18-00000", DIGEST, make_table(20, 1), SIGNER, "render-platform/1")


def pae(kind: str, payload: bytes) -> bytes:
    """PAE(type, body) = "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body."""
    return b" ".join([b"DSSEv1", str(len(kind)).encode(), kind.encode(), str(len(payload)).encode(), payload])


def signed(statement: dict[str, Any], signer: FileSigner = SIGNER, kind: str = batches.PAYLOAD_TYPE) -> bytes:
    """An envelope of any statement, made without the library's encoder."""
    payload = scalar_json(statement).encode()
    signature = signer.sign(pae(kind, payload))
    return scalar_json(
        {
            "payloadType": kind,
            "payload": base64.b64encode(payload).decode(),
            "signatures": [{"keyid": signer.verifier.vkey, "sig": base64.b64encode(signature).decode()}],
        }
    ).encode()


def statement_of(envelope: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(base64.b64decode(json.loads(envelope)["payload"]))
    return found


def test_an_independent_verifier_accepts_it() -> None:
    envelope = json.loads(attested())
    assert list(envelope) == ["payloadType", "payload", "signatures"]
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    payload = base64.b64decode(envelope["payload"], validate=True)
    (signature,) = envelope["signatures"]
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(signature["keyid"].split("+", 2)[2])[1:])
    message = pae("application/vnd.in-toto+json", payload)
    public.verify(base64.b64decode(signature["sig"], validate=True), message)
    with pytest.raises(InvalidSignature):
        public.verify(base64.b64decode(signature["sig"]), payload)


def test_it_says_what_the_batch_holds() -> None:
    statement = statement_of(attested())
    events = make_events(20, 1)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [{"name": "2023-11-16T18-00000", "digest": {"sha256": DIGEST}}]
    resources = statement["predicate"].pop("resources")
    assert sum(resource["gpu_time_ns"] for resource in resources) == sum(event.gpu_time_ns for event in events)
    assert sum(resource["events"] for resource in resources) == 20
    assert statement["predicate"] == {
        "events": 20,
        "gpu_time_ns": sum(event.gpu_time_ns for event in events),
        "devices": sorted({event.device_uuid for event in events if event.device_uuid is not None}),
        "meters": sorted({event.meter for event in events}),
        "first_event_time_us": min(event.event_time for event in events),
        "last_event_time_us": max(event.event_time for event in events),
        "software": "render-platform/1",
    }


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_a_batch_ends_where_its_footer_says(rows: int) -> None:
    data = batches.encode(make_table(rows, 1))
    assert batches.decode(data).num_rows == rows
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") :]
    for padded in (data + b"PAR1", data + b"hidden" + footer, data + data):
        with pytest.raises(Finding, match="Parquet"):
            batches.decode(padded)


def test_the_same_batch_gives_the_same_bytes_and_they_are_canonical() -> None:
    assert attested() == attested()
    assert signed(statement_of(attested())) == attested()


def test_it_is_accepted_for_its_batch_and_key_alone() -> None:
    assert batches.check_attestation(attested(), DIGEST, KEYS) == statement_of(attested())["predicate"]
    with pytest.raises(Finding, match="another batch"):
        batches.check_attestation(attested(), "cd" * 32, KEYS)
    for keys in ({}, {OTHER.verifier.vkey: OTHER.verifier}):
        with pytest.raises(Finding, match="known key"):
            batches.check_attestation(attested(), DIGEST, keys)
    with pytest.raises(Finding, match="known key"):
        batches.check_attestation(attested(), DIGEST, {SIGNER.verifier.vkey: OTHER.verifier})


def test_any_altered_byte_of_it_is_refused() -> None:
    envelope = attested()
    for position in range(len(envelope)):
        altered = envelope[:position] + bytes([envelope[position] ^ 1]) + envelope[position + 1 :]
        with pytest.raises(Finding):
            batches.check_attestation(altered, DIGEST, KEYS)


def test_an_altered_payload_is_refused() -> None:
    envelope = json.loads(attested())
    statement = statement_of(attested())
    statement["predicate"]["gpu_time_ns"] += 1
    envelope["payload"] = base64.b64encode(scalar_json(statement).encode()).decode()
    with pytest.raises(Finding, match="known key"):
        batches.check_attestation(scalar_json(envelope).encode(), DIGEST, KEYS)


def test_a_known_key_under_another_payload_type_is_refused() -> None:
    with pytest.raises(Finding):
        batches.check_attestation(signed(statement_of(attested()), kind="text/plain"), DIGEST, KEYS)


@pytest.mark.parametrize(
    "statement",
    [
        {},
        {"subject": []},
        {"subject": [{"digest": {}}]},
        {"subject": "x"},
        {"subject": [{"digest": {"sha256": DIGEST}}]},
        {"subject": [{"digest": {"sha256": DIGEST}}], "predicate": None},
        {"subject": [{"digest": {"sha256": DIGEST}}], "predicate": 5},
        {"_type": "other", "subject": [{"digest": {"sha256": DIGEST}}], "predicateType": "other", "predicate": {}},
    ],
)
def test_another_statement_by_a_known_key_is_refused(statement: dict[str, Any]) -> None:
    with pytest.raises(Finding):
        batches.check_attestation(signed(statement), DIGEST, KEYS)


@pytest.mark.parametrize(
    "envelope",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"payload":5}',
        b'{"payload":"%","signatures":[]}',
        b'{"payloadType":"","payload":"","signatures":[]}',
        b'{"payloadType":"","payload":"","signatures":[{"keyid":[],"sig":""}]}',
        b'{"payloadType":"","payload":"","signatures":{"0":1}}',
        '{"payload":"é"}'.encode(),
    ],
    ids=repr,
)
def test_what_is_no_envelope_is_a_finding(envelope: bytes) -> None:
    with pytest.raises(Finding):
        batches.check_attestation(envelope, DIGEST, KEYS)


def test_the_stored_attestation_is_its_entrys(tmp_path: Path) -> None:
    platform = make_platform(tmp_path)
    events = record_random(platform, 9, 1)
    platform.flush()
    (entry,) = (json.loads(data) for data in read_log(tmp_path, 1))
    envelope = read_blob(tmp_path, entry["attestation"])
    keys = {platform.attestation_signer.verifier.vkey: platform.attestation_signer.verifier}
    platform.close()
    found = batches.check_attestation(envelope, entry["subject_digest"], keys)
    assert (found["events"], found["gpu_time_ns"]) == (9, sum(event.gpu_time_ns for event in events))
