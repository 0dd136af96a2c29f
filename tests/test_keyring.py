"""Key rotation: which keys may sign what, what is refused, key files that a crash leaves in between, and signers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from render_platform import keyring as keys
from render_platform.canonical import digest_of
from render_platform.entries import FIRST_PREVIOUS, AuditEntry
from render_platform.errors import Finding, Missing, UsageError
from render_platform.keyring import Keyring, Pinned, Rotation
from render_platform.note import Checkpoint, FileSigner, Signer, sign_note

ORIGIN = "example.com/log"
EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def signer(number: int, name: str = ORIGIN) -> FileSigner:
    return FileSigner(name, Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


K1, K2, K3, K4 = (signer(number) for number in (1, 2, 3, 4))
RECOVERY = signer(9, f"{ORIGIN}/recovery")
OTHER_RECOVERY = signer(10, f"{ORIGIN}/recovery")
FILLER = AuditEntry(type="charges", batch_id="filler", previous=FIRST_PREVIOUS)


def rotation(
    old: Signer,
    new: Signer,
    from_size: int = 0,
    overlap: int = 0,
    role: str = "checkpoint",
    recovery: Signer = RECOVERY,
) -> str:
    made = Rotation(role, old.verifier, new.verifier, recovery.verifier, from_size, overlap)
    return keys.countersign(keys.propose(made, old, new), recovery)


class Log:
    """Entries with blobs, as a verifier reads them."""

    def __init__(self, **notes: str) -> None:
        """`at10=note`: the entry 10 is that rotation's; the rest is of other types."""
        self.blobs: dict[str, bytes] = {}
        placed = {int(name.removeprefix("at")): note for name, note in notes.items()}
        self.entries = [
            (n, self._entry(placed[n]) if n in placed else FILLER) for n in range(max(placed, default=0) + 1)
        ]

    def _entry(self, note: str) -> AuditEntry:
        """Whatever the note is: a log could hold anything."""
        blob = note.encode()
        self.blobs[digest_of(blob)] = blob
        try:
            return keys.key_entry(note)[0]
        except Finding:
            digest, size = digest_of(blob), len(blob)
            name = f"checkpoint/{K2.verifier.key_id.hex()}"
            return AuditEntry(
                type="key", batch_id=name, previous=FIRST_PREVIOUS, subject_digest=digest, subject_size=size
            )

    def read(self, digest: str) -> bytes:
        if digest not in self.blobs:
            raise Missing(digest)
        return self.blobs[digest]

    def keyring(self, *pinned: Signer, recovery: Signer | None = None, role: str = "checkpoint") -> Keyring:
        by_role = {role: [one.verifier for one in pinned]} if pinned else {}
        return Keyring.from_entries(self.entries, Pinned(by_role, recovery.verifier if recovery else None), self.read)


def allowed(keyring: Keyring, size: int, role: str = "checkpoint") -> list[Signer]:
    by_key = {one.verifier: one for one in (K1, K2, K3, K4)}
    return [by_key[key] for key in keyring.allowed(role, size)]


def checkpoint(size: int, *signers: Signer) -> bytes:
    return sign_note(Checkpoint(ORIGIN, size, bytes(32)).text(), signers).encode()


@pytest.mark.parametrize("pinned", [[K1], [K2], [K1, K2], []], ids=["old", "new", "both", "recovery alone"])
def test_old_alone_then_both_then_new_alone(pinned: list[Signer]) -> None:
    """Whoever pinned any of the keys, or the recovery key alone, comes to the same."""
    found = Log(at10=rotation(K1, K2, from_size=20, overlap=5)).keyring(*pinned, recovery=RECOVERY)
    assert found.problems == ()
    at = {size: allowed(found, size) for size in (0, 19, 20, 24, 25, 10**9)}
    assert at == {0: [K1], 19: [K1], 20: [K1, K2], 24: [K1, K2], 25: [K2], 10**9: [K2]}


def test_a_rotation_never_holds_before_the_tree_that_has_it() -> None:
    found = Log(at10=rotation(K1, K2, from_size=3, overlap=2)).keyring(K1)
    assert [allowed(found, size) for size in (3, 10, 11, 12, 13)] == [[K1], [K1], [K1, K2], [K1, K2], [K2]]


def test_without_rotations_the_pinned_keys_may_sign() -> None:
    assert allowed(Log().keyring(K1), 7) == [K1]
    assert allowed(Log().keyring(recovery=RECOVERY), 7) == []
    with pytest.raises(Finding, match="no key of the log is pinned"):
        Log().keyring(recovery=RECOVERY).read_checkpoint(checkpoint(7, K1))


def test_a_chain_is_followed_from_any_of_its_keys() -> None:
    log = Log(at1=rotation(K1, K2, overlap=1), at5=rotation(K2, K3), at6=rotation(K3, K4, overlap=100))
    for pinned in (K1, K2, K3, K4):
        found = log.keyring(pinned)
        assert found.problems == ()
        at = [allowed(found, size) for size in (1, 2, 3, 5, 6, 7, 106, 107)]
        assert at == [[K1], [K1, K2], [K2], [K2], [K3], [K3, K4], [K3, K4], [K4]]
    assert log.keyring(K1).recovery == RECOVERY.verifier


def test_checkpoints_are_read_with_the_keys_of_their_size() -> None:
    found = Log(at10=rotation(K1, K2, from_size=20, overlap=5)).keyring(K1)
    good = [(19, [K1]), (20, [K1]), (20, [K2]), (24, [K2, K1]), (25, [K2]), (25, [K1, K2])]
    for size, signers in good:
        assert found.read_checkpoint(checkpoint(size, *signers)).size == size
    for size, by in [(25, K1), (10**6, K1), (19, K2), (0, K2)]:
        with pytest.raises(Finding, match=f"may not sign a tree of {size}"):
            found.read_checkpoint(checkpoint(size, by))
    with pytest.raises(Finding, match="no known key"):
        found.read_checkpoint(checkpoint(20, K3))


def lacking(note: str, which: int) -> str:
    head, _, lines = note.partition("\n\n")
    kept = [line for n, line in enumerate(lines.splitlines(keepends=True)) if n != which]
    return f"{head}\n\n{''.join(kept)}"


GOOD = rotation(K1, K2)


@pytest.mark.parametrize(
    "bad",
    [
        lacking(GOOD, 0),
        lacking(GOOD, 1),
        lacking(GOOD, 2),
        GOOD.replace('"overlap":0', '"overlap":1'),
        GOOD.replace('"overlap":0', '"overlap":0.0'),
        GOOD.replace('"overlap":0', '"overlap":true'),
        GOOD.replace('"overlap":0', '"overlap":-1'),
        GOOD.replace('"role":', '"roles":'),
        GOOD.replace('"role":"checkpoint"', '"role":"recovery"'),
        GOOD.replace('"role":"checkpoint"', '"role": "checkpoint"'),
        GOOD.replace("rotation/v1", "rotation/v2"),
        GOOD.replace(K2.verifier.vkey, "no key"),
        GOOD + GOOD.rpartition("\n— ")[2].join(["— ", ""]),
        GOOD + sign_note(GOOD.partition("\n\n")[0] + "\n", [K3]).rpartition("\n\n")[2],
        lacking(GOOD, 2) + sign_note(GOOD.partition("\n\n")[0] + "\n", [OTHER_RECOVERY]).rpartition("\n\n")[2],
        "",
        "\n\n",
        "x" * 20_000,
        checkpoint(7, K1).decode(),
    ],
    ids=range(19),
)
def test_what_is_no_rotation_is_named_and_not_followed(bad: str) -> None:
    with pytest.raises(Finding):
        Rotation.open(bad)
    found = Log(at3=bad).keyring(K1)
    assert [problem.index for problem in found.problems] == [3]
    assert allowed(found, 10**6) == [K1]


@pytest.mark.parametrize(
    ("old", "new", "recovery"),
    [(K1, K1, RECOVERY), (K1, signer(2, "other"), RECOVERY), (K1, K2, signer(1, "r")), (K1, K2, signer(7))],
    ids=["the same", "another name", "the old one as recovery", "a recovery key of the log's name"],
)
def test_keys_that_cannot_rotate(old: Signer, new: Signer, recovery: Signer) -> None:
    with pytest.raises(Finding, match="rotation"):
        rotation(old, new, recovery=recovery)


@pytest.mark.parametrize(
    ("log", "index", "what"),
    [
        (Log(at1=rotation(K1, K2), at5=rotation(K1, K3)), 5, "not the checkpoint key in force"),
        (Log(at1=rotation(K1, K2), at5=rotation(K2, K1)), 5, "brings a retired key back"),
        (Log(at1=rotation(K1, K2), at5=rotation(K1, K2)), 5, "not the checkpoint key in force"),
        (Log(at1=rotation(K1, K2, 50), at5=rotation(K2, K3, 40)), 5, "before the one that it follows"),
        (Log(at1=rotation(K1, K2), at5=rotation(K2, K3, recovery=OTHER_RECOVERY)), 5, "recovery key that is pinned"),
    ],
    ids=["a fork", "back again", "twice", "out of order", "another recovery key"],
)
def test_a_rotation_that_does_not_follow(log: Log, index: int, what: str) -> None:
    found = log.keyring(K1)
    assert [(problem.index, what in problem.what) for problem in found.problems] == [(index, True)]
    assert allowed(found, 10**6) == [K2]


def test_the_pinned_recovery_key_decides() -> None:
    """Who stole the key in force makes a recovery key of his own; only a verifier that pinned the real one sees it."""
    stolen = Log(at4=rotation(K1, K4, recovery=OTHER_RECOVERY))
    refused = stolen.keyring(K1, recovery=RECOVERY)
    assert "recovery key that is pinned" in refused.problems[0].what
    assert allowed(refused, 100) == [K1]
    followed = stolen.keyring(K1)
    assert (followed.problems, followed.recovery) == ((), OTHER_RECOVERY.verifier)


def test_a_pinned_key_that_the_log_does_not_name() -> None:
    """A log that is older than the key, or another log."""
    found = Log(at1=rotation(K1, K2)).keyring(K3)
    assert [(problem.index, "not among those" in problem.what) for problem in found.problems] == [(None, True)]
    assert allowed(found, 100) == [K3]


def test_roles_rotate_by_themselves() -> None:
    found = Log(at1=rotation(K1, K2, role="attestation"), at2=rotation(K3, K4, role="gateway")).keyring(K1)
    assert allowed(found, 100) == [K1]
    assert allowed(found, 2, "attestation") == [K2]
    assert [allowed(found, size, "gateway") for size in (2, 3)] == [[K3], [K4]]


def test_an_entry_that_says_something_else_than_its_subject() -> None:
    log = Log(at1=GOOD)
    index, entry = log.entries[1]
    for wrong in (
        replace(entry, batch_id="checkpoint/00000000"),
        replace(entry, records=1),
        replace(entry, subject_digest=None),
        replace(entry, subject_digest="0" * 64),
    ):
        log.entries[1] = index, wrong
        found = log.keyring(K1)
        assert [problem.index for problem in found.problems] == [1]
        assert allowed(found, 100) == [K1]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 12), st.integers(0, 5)), max_size=6))
def test_what_may_sign_is_never_empty_and_never_comes_back(steps: list[tuple[int, int, int, int]]) -> None:
    """Any mess of rotations: a key's sizes are one interval, and at each size somebody may sign."""
    notes = {
        f"at{n}": rotation(signer(old), signer(new), size, overlap)
        for n, (old, new, size, overlap) in enumerate(steps)
        if old != new
    }
    found = Log(**notes).keyring(K1)
    at = [allowed(found, size) for size in range(40)]
    assert all(at)
    for key in (K1, K2, K3, K4):
        sizes = [size for size, one in enumerate(at) if key in one]
        assert sizes == list(range(min(sizes, default=0), max(sizes, default=-1) + 1))


def test_the_recovery_key_signs_only_what_old_and_new_have_signed() -> None:
    draft = GOOD.replace(GOOD[GOOD.rindex("— ") :], "")
    assert keys.countersign(draft, RECOVERY) == GOOD
    for wrong in (GOOD, lacking(draft, 0), lacking(draft, 1), draft.replace('"overlap":0', '"overlap":9')):
        with pytest.raises(Finding):
            keys.countersign(wrong, RECOVERY)
    with pytest.raises(UsageError, match="names the recovery key"):
        keys.countersign(draft, OTHER_RECOVERY)
    with pytest.raises(UsageError, match="not the keys"):
        keys.propose(Rotation.open(GOOD), K2, K1)
