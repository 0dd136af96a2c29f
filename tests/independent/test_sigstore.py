"""sigstore's verifier for Node.js accepts our checkpoint and inclusions, and refuses them once anything is altered."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from render_platform.note import Checkpoint, sign_note
from tests.independent.logs import WrittenLog, base64_of, record_of
from tests.independent.tools import ask, installed, sigstore_program
from tests.stories import signer

INDEX = 1_234


@pytest.fixture(scope="module")
def sigstore() -> list[str]:
    return installed(sigstore_program)


def request_of(log: WrittenLog, indexes: list[int]) -> dict[str, Any]:
    verifier, hashes = log.signer.verifier, log.hashes
    public = Ed25519PublicKey.from_public_bytes(verifier.public)
    checkpoint = (log.folder / "checkpoint").read_text()
    return {
        "name": verifier.name,
        "key_id": base64_of(verifier.key_id),
        "public_key": base64_of(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)),
        "inclusions": [
            {**record_of(hashes, index), "entry": base64_of(log.entries[index]), "checkpoint": checkpoint}
            for index in indexes
        ],
    }


def test_the_checkpoint_and_inclusions_are_verified(
    sigstore: list[str], written_log: WrittenLog, rng: random.Random
) -> None:
    indexes = [*rng.sample(range(written_log.size), 100), 0, written_log.size - 1]
    verdict = ask(sigstore, request_of(written_log, indexes))
    assert verdict.accepted, verdict.said
    assert verdict.said == f'{{"verified":{len(indexes)}}}\n'


def signature_altered(one: dict[str, Any], _log: WrittenLog) -> None:
    text = one["checkpoint"]
    at = len(text) - 40
    one["checkpoint"] = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]


def size_altered(one: dict[str, Any], log: WrittenLog) -> None:
    one["checkpoint"] = one["checkpoint"].replace(f"\n{log.size}\n", f"\n{log.size - 1}\n", 1)


def size_altered_and_signed(one: dict[str, Any], log: WrittenLog) -> None:
    """So much smaller that the proof has another length."""
    one["checkpoint"] = sign_note(Checkpoint(log.signer.name, INDEX + 1, log.roots[-1]).text(), [log.signer])


def root_altered_and_signed(one: dict[str, Any], log: WrittenLog) -> None:
    one["checkpoint"] = sign_note(Checkpoint(log.signer.name, log.size, bytes(32)).text(), [log.signer])


def another_key(one: dict[str, Any], log: WrittenLog) -> None:
    one["checkpoint"] = sign_note(log.history[-1].text(), [signer(log.signer.name, 9)])


def entry_altered(one: dict[str, Any], log: WrittenLog) -> None:
    one["entry"] = base64_of(log.entries[INDEX] + b" ")


def another_index(one: dict[str, Any], _log: WrittenLog) -> None:
    one["index"] = INDEX + 1


def proof_altered(one: dict[str, Any], _log: WrittenLog) -> None:
    one["proof"][3] = base64_of(bytes(32))


def proof_cut(one: dict[str, Any], _log: WrittenLog) -> None:
    one["proof"].pop()


SIGNATURE, ROOT, LENGTH = "invalid checkpoint signature", "calculated root hash", "invalid hash count"


@pytest.mark.parametrize(
    ("alter", "why"),
    [
        (signature_altered, SIGNATURE),
        (size_altered, SIGNATURE),
        (size_altered_and_signed, LENGTH),
        (root_altered_and_signed, ROOT),
        (another_key, SIGNATURE),
        (entry_altered, ROOT),
        (another_index, ROOT),
        (proof_altered, ROOT),
        (proof_cut, LENGTH),
    ],
)
def test_what_is_altered_is_refused(
    sigstore: list[str], written_log: WrittenLog, alter: Callable[[dict[str, Any], WrittenLog], None], why: str
) -> None:
    asked = request_of(written_log, [INDEX])
    alter(asked["inclusions"][0], written_log)
    verdict = ask(sigstore, asked)
    assert not verdict.accepted
    assert f": {why}" in verdict.said, verdict.said
