"""A witness: published requests and their answers, and a model of what it must answer."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import cast

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from render_platform import merkle
from render_platform.clock import ManualClock
from render_platform.note import Checkpoint, FileSigner, Verifier, WitnessKey, cosignatures_of, sign_note
from render_platform.objects import FolderObjects, ObjectStore
from render_platform.witness import (
    SIZE_TYPE,
    Answer,
    Witness,
    WitnessState,
)

NOW_S = 1_700_000_000
ORIGIN = "example.com/log"
NO_LOGS = b'{"logs":[]}'


def signer(number: int, name: str = ORIGIN) -> FileSigner:
    return FileSigner(name, Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


LOG, STRANGER, WITNESS = signer(1), signer(2), signer(3, "example.com/w1")
KEY = WitnessKey.of(WITNESS.name, WITNESS.verifier.public)


def leaves(count: int, fork_at: int = 10**9) -> list[bytes]:
    """The leaf hashes of the log, or of a fork of it that begins at an index."""
    return [merkle.leaf_hash(f"{n}{'x' if n >= fork_at else ''}".encode()) for n in range(count)]


def submission(old: int, hashes: list[bytes], by: FileSigner = LOG, proof: list[bytes] | None = None) -> bytes:
    """A request; with the proof that belongs to it where none is given."""
    if proof is None:
        proof = merkle.consistency_proof(old, hashes) if old <= len(hashes) else []
    note = sign_note(Checkpoint(by.name, len(hashes), merkle.root(hashes)).text(), [by])
    return "\n".join([f"old {old}", *(base64.b64encode(node).decode() for node in proof), "", note]).encode()


def witness_in(folder: Path, *logs: Verifier) -> Witness:
    objects = FolderObjects(folder)
    objects.create("state.json", NO_LOGS)
    by_origin: dict[str, list[Verifier]] = {}
    for log in logs or (LOG.verifier,):
        by_origin.setdefault(log.name, []).append(log)
    state = WitnessState(objects, objects.read("state.json"))
    return Witness(by_origin, WITNESS, state, ManualClock(NOW_S * 1_000_000 + 999_999))


@pytest.fixture
def witness(tmp_path: Path) -> Witness:
    return witness_in(tmp_path)


def check_cosigned(answer: Answer, hashes: list[bytes], by: FileSigner = LOG) -> None:
    assert (answer.status, answer.content_type) == (200, "text/plain; charset=utf-8")
    note = sign_note(Checkpoint(by.name, len(hashes), merkle.root(hashes)).text(), [by]) + answer.body
    assert [(one.key, one.time_s) for one in cosignatures_of(note, [KEY])] == [(KEY, NOW_S)]


# Published requests, of the tests of litewitness: a log of the Sigsum project, with the leaf hashes 2a 00…, 2a 01….

SIGSUM = "sigsum.org/v1/tree/4d6d8825a6bb689d459628312889dfbb0bcd41b5211d9e1ce768b0ff0309e562"
SIGSUM_KEY = Verifier.of(SIGSUM, bytes.fromhex("ffdc2d4d98e4124d3feaf788c0c2f9abfd796083d1f0495437f302ec79cf100f"))
ROOTS = {
    1: "KgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    3: "RcCI1Nk56ZcSmIEfIn0SleqtV7uvrlXNccFx595Iwl0=",
    5: "QrtXrQZCCvpIgsSmOsah7HdICzMLLyDfxToMql9WTjY=",
}
SIGNATURES = {
    1: "UgIom7fPZTqpxWWhyjWduBvTvGVqsokMbqTArsQilegKoFBJQjUFAmQ0+YeSPM3wfUQMFSzVnnNuWRTYrajXpNUbIQY=",
    3: "UgIom2VbtIcdFbwFAy1n7s6IkAxIY6J/GQOTuZF2ORV39d75cbAj2aQYwyJre36kezNobZs4SUUdrcawfAB8WVrx6go=",
    5: "UgIomw/EOJmWi0i1FQsOj+etB7F8IccFam/jgd6wzRns4QPVmyEZtdvl1U2KEmLOZ/ASRcWJi0tW90dJWAShei7sDww=",
}
NODES = {
    (1, 3): ["KgE" + "A" * 40 + "=", "KgI" + "A" * 40 + "="],
    (1, 5): ["KgE" + "A" * 40 + "=", "+fUDV+k970B4I3uKrqJM4aP1lloPZP8mvr2Z4wRw2LI=", "KgQ" + "A" * 40 + "="],
}


def sigsum(old: int, size: int, proof: list[str]) -> bytes:
    note = f"{SIGSUM}\n{size}\n{ROOTS[size]}\n\n— {SIGSUM} {SIGNATURES[size]}\n"
    return "\n".join([f"old {old}", *proof, "", note]).encode()


def test_published_requests_are_answered_as_published(tmp_path: Path) -> None:
    witness = witness_in(tmp_path, SIGSUM_KEY)
    wrong = [NODES[1, 3][0], "KgI" + "A" * 39 + "E="]
    answers = [
        (witness.add_checkpoint(sigsum(0, 1, [NODES[1, 3][0]] * 64)), 400),
        (witness.add_checkpoint(sigsum(0, 1, [])), 200),
        (witness.add_checkpoint(sigsum(1, 3, NODES[1, 3]).replace(b"x6go=", b"x6gs=")), 403),
        (witness.add_checkpoint(sigsum(1, 3, NODES[1, 3]).replace(b"309e562", b"309e561")), 404),
        (witness.add_checkpoint(sigsum(1, 3, [])), 422),
        (witness.add_checkpoint(sigsum(1, 3, wrong)), 422),
        (witness.add_checkpoint(sigsum(1, 3, NODES[1, 3])), 200),
        (witness.add_checkpoint(sigsum(1, 5, NODES[1, 5])), 409),
    ]
    assert [answer.status for answer, _ in answers] == [status for _, status in answers]
    assert (answers[-1][0].body, answers[-1][0].content_type) == ("3\n", SIZE_TYPE)


# What it must answer.


def test_a_first_checkpoint_and_one_that_extends_it(witness: Witness) -> None:
    check_cosigned(witness.add_checkpoint(submission(0, leaves(5))), leaves(5))
    check_cosigned(witness.add_checkpoint(submission(5, leaves(9))), leaves(9))
    check_cosigned(witness.add_checkpoint(submission(9, leaves(9))), leaves(9))
    stale = witness.add_checkpoint(submission(0, leaves(9)))
    assert stale == Answer(409, "9\n", SIZE_TYPE)
    assert witness.add_checkpoint(submission(5, leaves(7))) == stale


def test_a_fork_is_refused(witness: Witness) -> None:
    """Two logs of one origin, both signed with its key: that a thief has it, or that it lies, changes nothing."""
    check_cosigned(witness.add_checkpoint(submission(0, leaves(8))), leaves(8))
    assert witness.add_checkpoint(submission(8, leaves(12, fork_at=3))).status == 422
    assert witness.add_checkpoint(submission(8, leaves(12, fork_at=3), proof=[])).status == 422
    same = witness.add_checkpoint(submission(8, leaves(8, fork_at=7)))
    assert (same.status, same.content_type, "forked" in same.body) == (409, "text/plain; charset=utf-8", True)
    assert witness.add_checkpoint(submission(8, leaves(8), proof=[bytes(32)])).status == 422
    check_cosigned(witness.add_checkpoint(submission(8, leaves(12))), leaves(12))


def test_who_signed_it(tmp_path: Path) -> None:
    """Both keys of a log that rotates are known; others are not, and a known key's bad signature is one too many."""
    new = signer(7)
    witness = witness_in(tmp_path, LOG.verifier, new.verifier)
    check_cosigned(witness.add_checkpoint(submission(0, leaves(2), by=new)), leaves(2))
    assert witness.add_checkpoint(submission(2, leaves(3), by=STRANGER)).status == 403
    assert witness.add_checkpoint(submission(2, leaves(3), by=signer(1, "example.com/other"))).status == 404
    signed = submission(2, leaves(3))
    stranger = submission(2, leaves(3), by=STRANGER).rpartition(b"\n\n")[2]
    check_cosigned(witness.add_checkpoint(signed + stranger), leaves(3))
    bad = base64.b64encode(new.verifier.key_id + bytes(64)).decode()
    assert witness.add_checkpoint(submission(3, leaves(4)) + f"— {ORIGIN} {bad}\n".encode()).status == 403


def test_logs_do_not_meet(tmp_path: Path) -> None:
    other = signer(5, "example.com/other")
    witness = witness_in(tmp_path, LOG.verifier, other.verifier)
    check_cosigned(witness.add_checkpoint(submission(0, leaves(5))), leaves(5))
    check_cosigned(witness.add_checkpoint(submission(0, leaves(3, fork_at=0), by=other)), leaves(3, fork_at=0), other)
    assert witness.add_checkpoint(submission(0, leaves(6))).body == "5\n"
    assert witness.add_checkpoint(submission(0, leaves(6), by=other)).body == "3\n"


@pytest.mark.parametrize(
    ("known", "old", "size", "root", "proof", "status"),
    [
        (0, 0, 0, merkle.EMPTY_ROOT, [], 200),
        (0, 0, 0, bytes(32), [], 422),
        (0, 0, 0, merkle.EMPTY_ROOT, [bytes(32)], 422),
        (0, 0, 1, leaves(1)[0], [], 200),
        (0, 0, 1, leaves(1)[0], [bytes(32)], 422),
        (1, 0, 1, leaves(1)[0], [bytes(32)], 409),
        (1, 1, 0, merkle.EMPTY_ROOT, [], 400),
    ],
)
def test_empty_trees(
    witness: Witness, known: int, old: int, size: int, root: bytes, proof: list[bytes], status: int
) -> None:
    if known:
        witness.add_checkpoint(submission(0, leaves(known)))
    note = sign_note(Checkpoint(ORIGIN, size, root).text(), [LOG])
    lines = [f"old {old}", *(base64.b64encode(node).decode() for node in proof), "", note]
    assert witness.add_checkpoint("\n".join(lines).encode()).status == status


GOOD = submission(1, leaves(3))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\n\n",
        b"old 0\n\n",
        b"old 0\n\nx",
        GOOD.replace(b"old 1", b"old 01"),
        GOOD.replace(b"old 1", b"old -1"),
        GOOD.replace(b"old 1", b"old +1"),
        GOOD.replace(b"old 1", b"old  1"),
        GOOD.replace(b"old 1", b"Old 1"),
        GOOD.replace(b"old 1", b"old 1 "),
        GOOD.replace(b"old 1", b"old \xd9\xa1"),
        GOOD.replace(b"old 1", b"old " + b"9" * 30),
        GOOD.replace(b"old 1\n", b"old 1\n\n"),
        GOOD.replace(b"old 1\n", b"old 1\nAAAA\n"),
        GOOD.replace(b"old 1\n", b"old 1\n" + b"A" * 42 + b"B=\n"),
        GOOD.replace(b"old 1\n", b"old 1\n" + b"A" * 43 + b"=\n" + b"\xff\n"),
        GOOD.replace(b"\n3\n", b"\n03\n"),
        GOOD[:-1],
        GOOD + b"\xff",
        GOOD.replace(b"old 1", b"old 4"),
    ],
    ids=range(20),
)
def test_malformed_requests(witness: Witness, body: bytes) -> None:
    witness.add_checkpoint(submission(0, leaves(1)))
    assert witness.add_checkpoint(body).status == 400
    assert witness.add_checkpoint(submission(0, leaves(3))).body == "1\n", "nothing has changed"


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 400))
def test_damaged_requests_are_never_cosigned(noise: bytes, start: int, length: int) -> None:
    known = {ORIGIN: [LOG.verifier]}
    state = WitnessState(cast(ObjectStore, Memory()), NO_LOGS)
    witness = Witness(known, WITNESS, state, ManualClock(NOW_S * 1_000_000))
    whole = submission(0, leaves(3))
    damaged = whole[:start] + noise + whole[start + length :]
    answer = witness.add_checkpoint(damaged)
    if answer.status == 200 or damaged == whole:
        check_cosigned(answer, leaves(3))  # a line of an unknown key was added, or nothing was damaged


class Memory:
    """The one method of an ObjectStore that a state needs."""

    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        pass


STEPS = st.lists(
    st.tuples(
        st.integers(0, 9),  # the checkpoint's size
        st.sampled_from([10**9, 2, 5]),  # where its history forks, if it does
        st.one_of(st.none(), st.integers(0, 9)),  # old; none: what the witness knows
        st.sampled_from(["right", "right", "right", "none", "long", "other"]),  # the proof
        st.sampled_from([LOG, LOG, LOG, STRANGER]),
    ),
    max_size=25,
)


@given(STEPS)
def test_any_sequence_of_requests_against_a_model(
    steps: list[tuple[int, int, int | None, str, FileSigner]],
) -> None:
    """The model keeps all leaves that were cosigned: what extends them is good, and nothing else is."""
    witness = Witness(
        {ORIGIN: [LOG.verifier]}, WITNESS, WitnessState(cast(ObjectStore, Memory()), NO_LOGS), ManualClock(10**12)
    )
    known: list[bytes] = []
    for size, fork_at, old, kind, by in steps:
        new, old = leaves(size, fork_at), len(known) if old is None else old
        right = merkle.consistency_proof(old, new) if old <= size else []
        proof = {"right": right, "none": [], "long": [*right, bytes(32)], "other": [bytes(32)] * len(right)}[kind]
        answer = witness.add_checkpoint(submission(old, new, by, proof))
        if by is STRANGER:
            expected = 403
        elif old > size:
            expected = 400
        elif old != len(known):
            expected = 409
            assert answer == Answer(409, f"{len(known)}\n", SIZE_TYPE)
        elif proof != right:
            expected = 422
        elif new[:old] != known:
            expected = 409 if size == old else 422
        else:
            expected, known = 200, new
        assert answer.status == expected
