"""More of test_keyring.py: a log that rotates its key, crashes on the way, and signers by configuration."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from docs.examples.kms_signer import KmsSigner
from render_platform import keyring as keys
from render_platform.entries import AuditEntry, parse
from render_platform.errors import SequencerStopped, Unavailable, UsageError
from render_platform.keyring import Keyring, Pinned
from render_platform.merkle import root
from render_platform.note import (
    Checkpoint,
    Signer,
    Verifier,
    cosignature_line,
    load_key,
    load_or_create_key,
    open_note,
    sign_note,
)
from tests.platforms import connect, read_log
from tests.test_audit_log import append, open_log, signer_of
from tests.test_keyring import K1, K2, K4, ORIGIN, OTHER_RECOVERY, RECOVERY, rotation, signer
from tests.test_witness import KEY, WITNESS, leaves, submission


def key_path(state: Path) -> Path:
    return state / "keys" / "checkpoint.key"


def settled(state: Path) -> tuple[list[Signer], Keyring]:
    """What a start does: the files in their places, then the signers."""
    log = open_log(state)
    size, ring = len(rows(state)), log._keys.keyring()
    keys.settle_key_files("checkpoint", key_path(state), ring, size)
    return keys.open_signers("", key_path(state)), ring


def rows(state: Path) -> list[Any]:
    connection = connect(state)
    try:
        return list(connection.execute("SELECT log_index FROM log_entries"))
    finally:
        connection.close()


def rotate(state: Path, overlap: int) -> int:
    """What the command does."""
    ring, log = settled(state)[1], open_log(state)
    draft = keys.draft_rotation("checkpoint", key_path(state), RECOVERY.verifier, len(rows(state)), overlap)
    assert draft == keys.draft_rotation("checkpoint", key_path(state), RECOVERY.verifier, len(rows(state)), overlap)
    note = keys.countersign(draft, RECOVERY)
    return keys.log_rotation(note, ring, len(rows(state)), log._cas.put, lambda one: log.append(one, lambda *_: None))


def published(state: Path) -> tuple[int, list[str]]:
    """The size that stands published, and the vkeys that signed it, by the log's own entries."""
    data = (state / "log" / "checkpoint").read_text()
    return int(data.split("\n")[1]), [line.split(" ")[2][:6] for line in data.splitlines() if line.startswith("— ")]


def test_a_log_goes_on_under_its_new_key(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    append(log, "a", "b")
    log.publish()
    old_signer = signer_of(tmp_path)
    old = old_signer.verifier
    assert rotate(tmp_path, overlap=2) == 2
    signers, _ = settled(tmp_path)
    new = signers[0].verifier
    assert [one.verifier for one in signers] == [new, old]
    assert new.name == old.name
    log = open_log_with(tmp_path, signers)
    signed = []
    for name in "cdef":
        assert log.publish() is not None
        signed.append(published(tmp_path))
        append(log, name)
    # The rotation is entry 2: both sign sizes 3 and 4, the new key alone from 5 on.
    assert [(size, len(set(lines))) for size, lines in signed] == [(3, 2), (4, 2), (5, 1), (6, 1)]
    assert [one.verifier for one in settled(tmp_path)[0]] == [new]
    assert not keys.retiring_path(key_path(tmp_path)).exists()
    check_followed(tmp_path, old, [old, new])
    with pytest.raises(SequencerStopped, match="no key at hand may sign a checkpoint of 7"):
        open_log_with(tmp_path, [old_signer]).publish()
    with pytest.raises(SequencerStopped, match="do not name the key at hand"):
        open_log_with(tmp_path, [K4]).publish()


def check_followed(state: Path, pinned: Any, chain: list[Any]) -> None:
    """A verifier with the files alone, and one pinned key, comes to the published checkpoint."""
    data = (state / "log" / "checkpoint").read_bytes()
    size = int(data.split(b"\n")[1])
    entries = [(n, parse(entry)) for n, entry in enumerate(read_log(state, size))]
    found = Keyring.from_entries(entries, Pinned({"checkpoint": [pinned]}), open_log(state)._cas.get)
    assert found.problems == ()
    assert [span.key for span in found.spans["checkpoint"]] == chain
    assert found.read_checkpoint(data).size == size


def open_log_with(state: Path, signers: list[Signer]) -> Any:
    log = open_log(state)
    return type(log)(log._database, log._cas, log._objects, *signers)


class Crash(Exception):
    """The process ends here."""


@pytest.mark.parametrize("overlap", [0, 2])
@pytest.mark.parametrize("at", ["next key", "draft", "blob", "entry", "link", "all"])
def test_a_crash_at_each_step_of_a_rotation(tmp_path: Path, at: str, overlap: int) -> None:
    """Whatever stands afterwards, a start goes on with a key that may sign, and the repeat ends the rotation."""
    log = open_log(tmp_path)
    append(log, "a")
    log.publish()
    old = signer_of(tmp_path).verifier
    path, state = key_path(tmp_path), tmp_path
    if at == "next key":
        load_or_create_key(keys.next_path(path), old.name)
    elif at != "all":
        _, ring = settled(state)
        note = keys.countersign(keys.draft_rotation("checkpoint", path, RECOVERY.verifier, 1, overlap), RECOVERY)
        if at != "draft":
            with pytest.raises(Crash):
                keys.log_rotation(note, ring, 1, log._cas.put, crash_after(log if at != "blob" else None))
        if at == "link":
            path_before = path.read_bytes()
            os.link(path, keys.retiring_path(path))
            assert keys.retiring_path(path).read_bytes() == path_before
    coming = load_key(keys.next_path(path)).verifier if keys.next_path(path).exists() else None
    signers, _ = settled(state)
    append(open_log_with(state, signers), "b")
    assert open_log_with(state, signers).publish() is not None
    if at not in ("entry", "link"):
        assert [one.verifier for one in signers] == [old], "nothing was logged: the old key is in force"
        rotate(state, overlap)
    signers, _ = settled(state)
    assert signers[0].verifier == (coming or signers[0].verifier) != old
    append(open_log_with(state, signers), "c", "d", "e")
    assert open_log_with(state, signers).publish() is not None
    assert [one.verifier for one in settled(state)[0]] == [signers[0].verifier]
    assert sorted(one.name for one in path.parent.iterdir()) == ["checkpoint.key"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    check_followed(state, old, [old, signers[0].verifier])


def crash_after(log: Any) -> Callable[[AuditEntry], int]:
    """An append that never returns; without a log it never happens either."""

    def append_and_die(draft: AuditEntry) -> int:
        if log is not None:
            log.append(draft, lambda *_: None)
        raise Crash

    return append_and_die


def test_a_rotation_that_nobody_would_follow_is_not_logged(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    append(log, "a")
    rotate(tmp_path, overlap=0)
    signers, ring = settled(tmp_path)
    with pytest.raises(UsageError, match="not the checkpoint key in force"):
        keys.log_rotation(rotation(K1, K2), ring, 2, log._cas.put, crash_after(None))
    mine = signer(7, signers[0].name)
    note = rotation(signers[0], mine, recovery=OTHER_RECOVERY)
    with pytest.raises(UsageError, match="another recovery key"):
        keys.log_rotation(note, ring, 2, log._cas.put, crash_after(None))
    assert len(rows(tmp_path)) == 2


def test_a_second_rotation_waits_for_the_first_ones_overlap(tmp_path: Path) -> None:
    append(open_log(tmp_path), "a")
    rotate(tmp_path, overlap=50)
    settled(tmp_path)
    with pytest.raises(UsageError, match="still in its overlap"):
        rotate(tmp_path, overlap=0)


# Signers.


class FakeKms:
    """What AWS KMS answers to two calls."""

    def __init__(self, key: Any, spoil: bytes = b"", down: bool = False) -> None:
        self._key, self._spoil, self._down = key, spoil, down

    def get_public_key(self, *, KeyId: str) -> dict[str, Any]:
        if self._down:
            raise ConnectionError("https://user:secret@kms.example")
        der = self._key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return {"KeyId": KeyId, "PublicKey": der}

    def sign(self, *, KeyId: str, Message: bytes, MessageType: str, SigningAlgorithm: str) -> dict[str, Any]:
        assert (KeyId, MessageType, SigningAlgorithm) == ("alias/log", "RAW", "ED25519_SHA_512")
        return {"Signature": self._key.sign(Message + self._spoil)}


KMS_KEY = Ed25519PrivateKey.from_private_bytes(bytes([1]) * 32)  # K1's


def test_a_log_signed_by_a_key_service(tmp_path: Path) -> None:
    one = KmsSigner(FakeKms(KMS_KEY), "alias/log", ORIGIN)
    assert one.verifier == K1.verifier
    assert open_note(sign_note("text\n", [one, K2]), [K1.verifier])[1] == [ORIGIN]
    append(open_log_with(tmp_path, [one]), "a")
    assert open_log_with(tmp_path, [one]).publish() is not None
    check_followed(tmp_path, K1.verifier, [K1.verifier])


def test_a_key_service_that_fails() -> None:
    with pytest.raises(UsageError, match="not an Ed25519 key"):
        KmsSigner(FakeKms(generate_private_key(SECP256R1())), "alias/log", ORIGIN)
    with pytest.raises(Unavailable, match="ConnectionError") as caught:
        KmsSigner(FakeKms(KMS_KEY, down=True), "alias/log", ORIGIN)
    assert "secret" not in str(caught.value)
    with pytest.raises(Unavailable, match="not its key's"):
        KmsSigner(FakeKms(KMS_KEY, spoil=b"!"), "alias/log", ORIGIN).sign(b"data")


def from_module() -> Signer:
    return K4


def test_what_a_configuration_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys" / "checkpoint.key"
    made = load_or_create_key(path, ORIGIN)
    other = load_or_create_key(tmp_path / "other.key", ORIGIN)
    monkeypatch.setenv("THE_LOG_KEY", (tmp_path / "other.key").read_text())

    def opened(source: str) -> list[Verifier]:
        return [one.verifier for one in keys.open_signers(source, path)]

    assert opened("") == [made.verifier]
    assert opened(f"file:{path}") == [made.verifier]
    assert opened(f"env:THE_LOG_KEY, file:{path}") == [other.verifier, made.verifier]
    assert opened("python:tests.test_key_rotation:from_module") == [K4.verifier]
    load_or_create_key(keys.retiring_path(path), ORIGIN)
    assert opened("") == [made.verifier, load_key(keys.retiring_path(path)).verifier]


@pytest.mark.parametrize(
    "source",
    ["kms:x", "env:", "file:", "python:", "python:os", "python:no_such:f", "python:os:no_such", "env:NOT_SET", ","],
)
def test_a_source_that_is_none(tmp_path: Path, source: str) -> None:
    with pytest.raises(UsageError) as caught:
        keys.open_signers(source, tmp_path / "key")
    assert caught.value.remedy


def test_a_log_with_a_second_signer_of_another_name(tmp_path: Path) -> None:
    """Two who answer for one log: each of them convinces who pinned it."""
    second = signer(8, "example.com/operator")
    append(open_log_with(tmp_path, [K1, second]), "a")
    assert open_log_with(tmp_path, [K1, second]).publish() is not None
    data = (tmp_path / "log" / "checkpoint").read_text()
    assert open_note(data, [second.verifier, K1.verifier])[1] == [ORIGIN, "example.com/operator"]
    check_followed(tmp_path, K1.verifier, [K1.verifier])


# The page.


def test_the_examples_of_the_page_are_what_is_made() -> None:
    page = (Path(__file__).parents[1] / "docs/spec/keys-and-witness.md").read_text()
    blocks = [part.split("\n```", 1)[0] + "\n" for part in page.split("```text\n")[1:]]
    checkpoint = Checkpoint(ORIGIN, 3, root(leaves(3)))
    cosigned = cosignature_line(checkpoint.text(), WITNESS, 1_700_000_000)
    assert blocks == [
        sign_note(checkpoint.text(), [K1, K2]) + cosigned,
        "".join(f"{key.vkey}\n" for key in (K1.verifier, K2.verifier, KEY)),
        rotation(K1, K2, from_size=20, overlap=5),
        submission(2, leaves(3), by=K1).decode(),
    ]
    assert [role for role in keys.ROLES if f"`{role}`" not in page] == []
