"""securesystemslib verifies the attestation of a batch, and refuses it once anything is altered."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest

from render_platform import __version__
from render_platform.events import UsageEvent
from render_platform.note import Verifier
from tests.independent.tools import Verdict, ask, dsse_program, installed
from tests.platforms import make_platform, read_blob, read_log, record_random
from tests.stories import signer

REFUSED = "Accepted signatures do not match threshold"


@dataclass(frozen=True)
class Attested:
    """A batch's entry, its events and its attestation as they stand in the state folder; the key pinned for it."""

    entry: dict[str, Any]
    events: list[UsageEvent]
    envelope: bytes
    key: Verifier


@pytest.fixture(scope="module")
def attested(tmp_path_factory: pytest.TempPathFactory) -> Attested:
    state = tmp_path_factory.mktemp("dsse") / "state"
    with closing(make_platform(state)) as platform:
        events = record_random(platform, 40, 1)
        platform.flush()
        entry = json.loads(read_log(state, 1)[0])
        return Attested(entry, events, read_blob(state, entry["attestation"]), platform.attestation_signer.verifier)


@pytest.fixture(scope="module")
def dsse() -> list[str]:
    return installed(dsse_program)


def verdict_on(dsse: list[str], envelope: dict[str, Any], key: Verifier, name: str = "") -> Verdict:
    return ask(dsse, {"envelope": envelope, "keys": {name or key.vkey: key.public.hex()}})


def test_the_attestation_of_a_batch_is_verified(dsse: list[str], attested: Attested) -> None:
    verdict = verdict_on(dsse, json.loads(attested.envelope), attested.key)
    assert verdict.accepted, verdict.said
    found = json.loads(verdict.said)
    assert (found["type"], found["keys"]) == ("application/vnd.in-toto+json", [attested.key.vkey])
    statement = json.loads(found["payload"])
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [
        {"name": attested.entry["batch_id"], "digest": {"sha256": attested.entry["subject_digest"]}}
    ]


def test_it_says_what_was_used(attested: Attested) -> None:
    """Each part that a statement of GPU usage must have, summed again from the events."""
    payload = base64.b64decode(json.loads(attested.envelope)["payload"])
    predicate = json.loads(payload)["predicate"]
    events = attested.events
    assert predicate["devices"] == sorted({e.device_uuid for e in events if e.device_uuid})
    assert predicate["meters"] == sorted({e.meter for e in events})
    assert (predicate["events"], predicate["gpu_time_ns"]) == (40, sum(e.gpu_time_ns for e in events))
    times = [e.event_time for e in events]
    assert (predicate["first_event_time_us"], predicate["last_event_time_us"]) == (min(times), max(times))
    assert predicate["software"] == f"render-platform/{__version__}"
    resources = predicate["resources"]
    assert [(one["device"], one["meter"]) for one in resources] == sorted(
        {(e.device_uuid, e.meter) for e in events}, key=lambda of: (of[0] or "", of[1])
    )
    for one in resources:
        of = [e for e in events if (e.device_uuid, e.meter) == (one["device"], one["meter"])]
        energy = [e.energy_mj for e in of if e.energy_mj is not None]
        assert one == {
            "device": one["device"],
            "meter": one["meter"],
            "events": len(of),
            "gpu_time_ns": sum(e.gpu_time_ns for e in of),
            "energy_events": len(energy),
            "energy_mj": sum(energy) if energy else None,
        }
    assert any(one["energy_mj"] is None for one in resources)
    assert any(one["device"] is None for one in resources)


def payload_altered(envelope: dict[str, Any]) -> None:
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["gpu_time_ns"] += 1
    envelope["payload"] = base64.b64encode(json.dumps(statement, separators=(",", ":")).encode()).decode()


def type_altered(envelope: dict[str, Any]) -> None:
    envelope["payloadType"] = "application/json"


def signature_altered(envelope: dict[str, Any]) -> None:
    signature = bytearray(base64.b64decode(envelope["signatures"][0]["sig"]))
    signature[10] ^= 1
    envelope["signatures"][0]["sig"] = base64.b64encode(signature).decode()


@pytest.mark.parametrize("alter", [payload_altered, type_altered, signature_altered])
def test_what_is_altered_is_refused(
    dsse: list[str], attested: Attested, alter: Callable[[dict[str, Any]], None]
) -> None:
    envelope = json.loads(attested.envelope)
    alter(envelope)
    verdict = verdict_on(dsse, envelope, attested.key)
    assert not verdict.accepted
    assert REFUSED in verdict.said


def test_another_key_is_refused_whatever_it_calls_itself(dsse: list[str], attested: Attested) -> None:
    other = signer(attested.key.name, 9).verifier
    for name in (other.vkey, attested.key.vkey):
        verdict = verdict_on(dsse, json.loads(attested.envelope), other, name)
        assert not verdict.accepted
        assert REFUSED in verdict.said
