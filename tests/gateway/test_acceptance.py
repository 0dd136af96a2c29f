"""Signed acceptances: what was signed opens, and nothing else does."""

from __future__ import annotations

import base64
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform import canonical
from render_platform.errors import Finding
from render_platform.gateway.jobs import FIELDS, Acceptance, acceptance_of
from render_platform.note import FileSigner, load_or_create_key, sign_note
from tests.gateway.engines import make_engine
from tests.gateway.virtual_time import run

KNOWN = Acceptance("gw-1", 3, 14, str(uuid.UUID(int=7 << 76)), "ab" * 32, 1_700_157_600_000_000)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> FileSigner:
    return load_or_create_key(tmp_path_factory.mktemp("keys") / "gateway.key", "render-platform.local/gw-1")


counts = st.integers(0, 2**63 - 1)


@given(st.builds(Acceptance, st.text("gw-0123", min_size=1), counts, counts, st.uuids().map(str), st.text(), counts))
def test_what_was_signed_opens(signer: FileSigner, acceptance: Acceptance) -> None:
    if "\0" in acceptance.request_digest or not acceptance.request_digest.isprintable():
        acceptance = replace(acceptance, request_digest="")
    assert Acceptance.open(acceptance.to_note(signer), signer.verifier) == acceptance


def test_it_is_a_signed_note_of_canonical_bytes(signer: FileSigner) -> None:
    """As docs/formats.md says it, without this module's help."""
    text, _, signatures = KNOWN.to_note(signer).partition("\n\n")
    assert text == (
        '{"gateway":"gw-1","epoch":3,"seq":14,"job_id":"00000000-0000-7000-0000-000000000000",'
        f'"request_digest":"{"ab" * 32}","time":1700157600000000}}'
    )
    name, data = signatures.removeprefix("— ").split()
    assert name == "render-platform.local/gw-1"
    assert signer.verifier.verifies(text.encode() + b"\n", base64.b64decode(data)[4:])


def test_an_altered_one_is_found(signer: FileSigner) -> None:
    note = KNOWN.to_note(signer)
    for at in range(note.index("\n\n")):
        altered = note[:at] + chr(ord(note[at]) ^ 1) + note[at + 1 :]
        with pytest.raises(Finding):
            Acceptance.open(altered, signer.verifier)


def test_one_of_another_key_is_refused(signer: FileSigner, tmp_path: Path) -> None:
    other = load_or_create_key(tmp_path / "other.key", signer.name)
    with pytest.raises(Finding):
        Acceptance.open(KNOWN.to_note(other), signer.verifier)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"gateway": "gw-1"},
        {name: getattr(KNOWN, name) for name in reversed(FIELDS)},
        {name: getattr(KNOWN, name) for name in FIELDS} | {"more": 1},
        {name: getattr(KNOWN, name) for name in FIELDS} | {"seq": "14"},
        {name: getattr(KNOWN, name) for name in FIELDS} | {"epoch": True},
        {name: getattr(KNOWN, name) for name in FIELDS} | {"gateway": None},
        {name: getattr(KNOWN, name) for name in FIELDS} | {"job_id": [1]},
    ],
)
def test_what_the_key_has_signed_otherwise_is_no_acceptance(signer: FileSigner, values: dict[str, object]) -> None:
    note = sign_note(canonical.encode(values).decode() + "\n", [signer])
    with pytest.raises(Finding):
        Acceptance.open(note, signer.verifier)


def test_it_says_what_the_database_says(signer: FileSigner, tmp_path: Path) -> None:
    async def test() -> None:
        async with make_engine(tmp_path) as rig:
            await rig.submit()
            job = await rig.submit(body=b'{"other":1}')
            found = acceptance_of(job, rig.store.gateway_id, rig.store.epoch)
            row = rig.sql("SELECT gateway_id, epoch, seq, job_id, request_digest, accepted_us FROM jobs WHERE seq = 2")
            digest = job.request.digest()
            assert row == [(found.gateway, 1, 2, job.job_id.bytes, digest, found.time)]
            assert (found.job_id, found.request_digest) == (str(job.job_id), digest.hex())
            assert Acceptance.open(found.to_note(signer), signer.verifier) == found
            await rig.idle()

    run(test)
