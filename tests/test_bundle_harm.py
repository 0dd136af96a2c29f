"""A bundle with anything removed, added, reordered or changed does not verify, whoever signs its manifest again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform.bundle import MAX_MEMBERS
from render_platform.clock import HOUR_US
from render_platform.errors import UsageError
from tests.bundles import FAR, LAST, Parts, Story, batch_of, make_story, note, pack, unpack
from tests.stories import named, said, signer


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return make_story(tmp_path_factory.mktemp("harm"))


@given(at=st.integers(0, 2**31), bit=st.integers(0, 7))
def test_one_changed_bit_anywhere(story: Story, at: int, bit: int) -> None:
    data = bytearray(story.data)
    data[at % len(data)] ^= 1 << bit
    assert story.verify(bytes(data)).verdict == "not_verified"


KINDS = ("remove", "repeat", "add", "swap", "move", "cut", "grow", "rename")


def mutate(members: list[tuple[str, bytes]], kind: str, at: int, other: int) -> None:
    """One member gone, twice, new, changed or elsewhere."""
    name, data = members[at]
    match kind:
        case "remove":
            del members[at]
        case "repeat":
            members.insert(other, members[at])
        case "add":
            members.insert(at, (("x", "../x", "/etc/x", "tile/entries/000")[other % 4], b"x"))
        case "swap":
            members[at], members[other] = (name, members[other][1]), (members[other][0], data)
        case "move":
            members.insert(other, members.pop(at))
        case "cut":
            members[at] = name, data[: len(data) // 2]
        case "grow":
            members[at] = name, data + b"\0"
        case "rename":
            members[at] = name + "x", data


@given(
    kind=st.sampled_from(KINDS),
    at=st.integers(0, 20),
    other=st.integers(0, 20),
    by=st.sampled_from(["", "other", "true"]),
)
def test_members_removed_added_swapped_or_moved(story: Story, kind: str, at: int, other: int, by: str) -> None:
    """Also with a manifest that lists them so. By another key it never verifies; by the true key where all evidence is
    as it was: the texts for a person and the order are the signer's own."""
    parts = unpack(story.data)
    members = list(parts.items())
    mutate(members, kind, at % len(members), other % len(members))
    data = b"".join(pack({name: one})[:-1024] for name, one in members) + bytes(1024)
    if by:
        data = story.sealed(dict(members), signer(story.signer.name, 9) if by == "other" else None)
    free = {"README.txt", "keys.txt", *LAST}
    kept = unpack(data)
    harmless = kept.keys() == parts.keys() and all(kept[name] == parts[name] for name in parts.keys() - free)
    same = data == story.data or (by == "true" and harmless)
    outcome = story.verify(data)
    assert outcome.verdict == ("verified" if same else "not_verified"), said(outcome)


Harm = Callable[[Story, Parts], bytes]
HARMS: dict[str, tuple[Harm, str]] = {
    "bytes after the end": (lambda s, p: s.data + b"\0", "other.tar"),
    "cut short": (lambda s, p: s.data[:-1], "other.tar"),
    "no bytes": (lambda s, p: b"", "other.tar"),
    "not a tar": (lambda s, p: b"PK\x03\x04" * 1000, "other.tar"),
    "a member twice": (lambda s, p: pack({"README.txt": b""})[:-1024] + s.data, "other.tar"),
    "a size beyond all bounds": (lambda s, p: pack(p).replace(b"%011o" % len(p["proof"]), b"7" * 11), "other.tar"),
    "a batch, and its line": (lambda s, p: s.sealed({n: d for n, d in p.items() if n != batch_of(s)}), "BATCH"),
    "the rows of a batch": (lambda s, p: s.sealed(p | {batch_of(s): p[batch_of(s)][:-1] + b"2"}), "BATCH"),
    "a stranger, and its line": (lambda s, p: s.sealed(p | {"stranger": b"x"}), "stranger"),
    "a path outside": (lambda s, p: s.sealed(p | {"../../etc/passwd": b"x"}), "../../etc/passwd"),
    "an entry": (lambda s, p: s.sealed(p | {"tile/entries/001": p["tile/entries/001"].replace(b"live", b"dead", 1)}),
                 "proof"),
    "the proof": (lambda s, p: s.sealed(p | {"proof": p["proof"][32:]}), "proof"),
    "more proof": (lambda s, p: s.sealed(p | {"proof": p["proof"] + bytes(32)}), "proof"),
    "no entries": (lambda s, p: s.sealed(p, end_entry=256), "proof"),
    "entries beyond the log": (lambda s, p: s.sealed(p, end_entry=10**9), "proof"),
    "a cut that is no number": (lambda s, p: s.sealed(p, first_entry="256"), "proof"),
    "hours that are none": (lambda s, p: s.sealed(p, start_us=FAR + 1), "manifest.json"),
    "another version": (lambda s, p: s.sealed(p, version=2), "manifest.json"),
    "one more claim": (lambda s, p: s.sealed(p, more=1), "manifest.json"),
    "fewer hours": (lambda s, p: s.sealed(p, end_us=FAR + HOUR_US), "sha256/"),
    "more hours": (lambda s, p: s.sealed(p, start_us=FAR - HOUR_US), "sha256/"),
    "a second signature": (
        lambda s, p: pack(p | {"manifest.note": p["manifest.note"] + "— other AAAAAAAA\n".encode()}), "manifest.json"),
    "a manifest by another key": (lambda s, p: s.sealed(p, signer(s.signer.name, 9)), "manifest.json"),
    "a checkpoint by another key": (
        lambda s, p: s.sealed(p | {"checkpoint": note(s.checkpoints[-1], signer(s.signer.name, 9))}), "checkpoint"),
    "an older checkpoint": (
        lambda s, p: s.sealed(p | {"checkpoint": note(s.checkpoints[1], s.signer)}), "proof"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMS)
def test_harm_is_found_and_named(story: Story, name: str) -> None:
    """Most of them signed again with the true key: the checkpoint's root and the entries find them all the same."""
    harm, where = HARMS[name]
    outcome = story.verify(harm(story, unpack(story.data)))
    assert (outcome.verdict, outcome.exit_code) == ("not_verified", 1)
    where = batch_of(story) if where == "BATCH" else where
    assert any(where in found for found in named(outcome)), said(outcome)


def test_members_without_end_are_refused_before_any_is_checked(story: Story) -> None:
    """Whoever made it: what stands in memory is a name and a digest of each of MAX_MEMBERS, and one member."""
    block = pack({"000000": b""})[:512]
    total = sum(block[:148] + b" " * 8 + block[156:])
    blocks = bytearray()
    for name in (b"%06d" % number for number in range(MAX_MEMBERS + 1)):
        blocks += name + block[6:148] + b"%06o" % (total + sum(name) - 6 * ord("0")) + block[154:]
    assert "one of more than" not in said(story.verify(bytes(blocks[:-512]) + bytes(1024)))
    assert f"one of more than {MAX_MEMBERS}" in said(story.verify(bytes(blocks) + bytes(1024)))


def test_keys_are_pinned_and_never_taken_from_the_bundle(story: Story) -> None:
    stranger = signer(story.signer.name, 9).verifier
    assert story.verify(story.data, keys=[stranger]).verdict == "not_verified"
    attesting = story.evidence.attestation_keys[0]
    with pytest.raises(UsageError, match="no pinned key is a log's"):
        story.verify(story.data, keys=[attesting])
    forged = signer(attesting.name, 9).verifier
    outcome = story.verify(story.data, keys=[*story.evidence.log_keys, forged])
    assert "not signed by a known key" in said(outcome)
    alone = story.verify(story.data, keys=story.evidence.log_keys)
    assert alone.verified
    assert any("attestation" in note for note in alone.notes)
