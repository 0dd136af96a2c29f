"""Signed notes: published vectors, the rules of C2SP signed-note, tlog-checkpoint and tlog-cosignature."""

from __future__ import annotations

import base64
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from render_platform import note
from render_platform.errors import Finding, UsageError
from render_platform.note import Checkpoint, FileSigner, Verifier, WitnessKey

VKEY = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
# The example of golang.org/x/mod/sumdb/note: a key, a text and its signature.
GO_KEY = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
GO_VKEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_NOTE = (
    "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n\n"
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqd"
    "ngotpRZb6KE6RyyBwJnAM=\n"
)
SEED = bytes(range(100, 132))
TEXT = "example.com/log\n3\n" + base64.b64encode(bytes(32)).decode() + "\n"


def signer(name: str = "example.com/log", seed: bytes = SEED) -> FileSigner:
    return FileSigner(name, Ed25519PrivateKey.from_private_bytes(seed))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def secrets_of(seed: bytes) -> list[str]:
    coded = [base64.b64encode(seed).decode(), base64.b64encode(b"\1" + seed).decode(), seed.hex(), repr(seed)]
    return [part[:20] for part in coded]


def test_the_published_verifier_key() -> None:
    verifier = Verifier.parse(VKEY)
    assert (verifier.name, verifier.key_id.hex()) == ("example.com/foo", "530d903a")
    assert verifier.vkey == VKEY
    assert note.key_id(verifier.name, verifier.public) == verifier.key_id


def test_the_published_note(tmp_path: Path) -> None:
    text, names = note.open_note(GO_NOTE, [Verifier.parse(GO_VKEY)])
    assert names == ["PeterNeumann"]
    path = tmp_path / "key"
    path.write_text(GO_KEY)
    path.chmod(0o600)
    ours = note.load_or_create_key(path, "another")
    assert ours.verifier.vkey == GO_VKEY
    assert note.sign_note(text, [ours]) == GO_NOTE


@pytest.mark.parametrize(
    "vkey",
    [
        "",
        "example.com/foo",
        VKEY[:-1],
        VKEY + "\n",
        VKEY.replace("530d903a", "530d903b"),
        VKEY.replace("530d903a", "530D903A"),
        VKEY.replace("foo+", "fop+"),
        VKEY.replace("+Aek", "+Bek"),
        VKEY.replace("example.com/foo", ""),
        VKEY.replace("example.com/foo", "example com/foo"),
        VKEY.replace("example.com/foo", "example.com\u00a0foo"),
        GO_KEY,
    ],
)
def test_other_verifier_keys_are_refused(vkey: str) -> None:
    with pytest.raises(UsageError) as caught:
        Verifier.parse(vkey)
    assert caught.value.remedy


def test_a_verifier_key_of_another_algorithm_is_refused() -> None:
    key = base64.b64encode(b"\4" + Verifier.parse(VKEY).public).decode()
    with pytest.raises(UsageError, match="not an Ed25519"):
        Verifier.parse(f"example.com/foo+530d903a+{key}")


@given(st.binary(min_size=32, max_size=32), st.text(alphabet="abc./éλ-", min_size=1))
def test_verifier_keys_come_back(seed: bytes, name: str) -> None:
    verifier = signer(name, seed).verifier
    assert Verifier.parse(verifier.vkey) == verifier


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\nb", "a\u2003b", "a\0b", "a\ud800b"])
def test_names_that_no_key_may_have(name: str) -> None:
    with pytest.raises(UsageError, match="key name"):
        signer(name)


@given(st.text(alphabet=st.characters(min_codepoint=32, exclude_categories=["Cs"])).map(lambda text: text + "\n"))
def test_notes_come_back(text: str) -> None:
    one, two = signer(), signer("example.com/witness", bytes(32))
    signed = note.sign_note(text, [one, two])
    assert note.open_note(signed, [two.verifier, one.verifier]) == (text, [one.name, two.name])
    assert note.open_note(signed, [two.verifier]) == (text, [two.name])


def test_what_is_signed_is_the_text_without_the_blank_line() -> None:
    signed = note.sign_note(TEXT, [signer()])
    line = signed.removeprefix(TEXT + "\n")
    data = base64.b64decode(line.removeprefix("— example.com/log ").removesuffix("\n"))
    assert data == signer().verifier.key_id + Ed25519PrivateKey.from_private_bytes(SEED).sign(TEXT.encode())


def test_a_text_may_hold_blank_lines_and_signatures() -> None:
    text = note.sign_note("inner\n", [signer()]) + "\nouter\n"
    assert note.open_note(note.sign_note(text, [signer()]), [signer().verifier])[0] == text


def test_unknown_keys_are_ignored() -> None:
    cosignature = base64.b64encode(b"\1\2\3\4" + bytes(72)).decode()
    same_name = signer(seed=bytes(32))
    signed = note.sign_note(TEXT, [signer(), same_name]) + f"— example.com/witness {cosignature}\n"
    assert note.open_note(signed, [signer().verifier]) == (TEXT, ["example.com/log"])
    with pytest.raises(Finding, match="no known key"):
        note.open_note(signed, [signer("example.com/other").verifier])
    with pytest.raises(Finding, match="no known key"):
        note.open_note(signed, [])


def test_a_key_counts_once() -> None:
    signed = note.sign_note(TEXT, [signer(), signer()])
    assert note.open_note(signed, [signer().verifier, signer().verifier])[1] == ["example.com/log"]


def test_a_known_keys_bad_signature_refuses_the_note() -> None:
    bad = base64.b64encode(signer().verifier.key_id + bytes(64)).decode()
    good = note.sign_note(TEXT, [signer(), signer("example.com/witness")])
    verifiers = [signer().verifier, signer("example.com/witness").verifier]
    with pytest.raises(Finding, match=r"signature of example\.com/log is wrong"):
        note.open_note(f"{good}— example.com/log {bad}\n", verifiers)
    with pytest.raises(Finding, match="is wrong"):
        note.open_note(good.replace("\n3\n", "\n4\n"), verifiers)


@given(st.integers(0, 63), st.integers(0, 7))
def test_every_bit_of_a_signature_counts(at: int, bit: int) -> None:
    signature = bytearray(signer().sign(TEXT.encode()))
    signature[at] ^= 1 << bit
    line = base64.b64encode(signer().verifier.key_id + bytes(signature)).decode()
    with pytest.raises(Finding, match="is wrong"):
        note.open_note(f"{TEXT}\n— example.com/log {line}\n", [signer().verifier])


SIGNED = note.sign_note(TEXT, [signer()])
LINE = SIGNED.removeprefix(TEXT + "\n")


@pytest.mark.parametrize(
    "malformed",
    [
        "",
        "\n",
        TEXT,
        TEXT + "\n",
        TEXT + LINE,
        SIGNED[:-1],
        SIGNED + "\n",
        SIGNED + "junk\n",
        SIGNED.replace("\n", "\r\n"),
        SIGNED.replace("\n\n", "\r\n\r\n"),
        SIGNED.replace("—", "-"),
        SIGNED.replace("—", "–"),
        SIGNED.replace("— ", "—"),
        SIGNED.replace("— ", "—  "),
        SIGNED.replace("— ", "—\u00a0"),
        SIGNED.replace("log ", "log  "),
        SIGNED.replace("— example.com/log ", "— "),
        SIGNED.replace("— example.com/log ", "— example.com+log "),
        SIGNED[:-3] + "\n",
        SIGNED[:-1] + "=\n",
        SIGNED[:-3] + chr(ord(SIGNED[-3]) + 1) + "=\n",  # The same bytes, with an unused bit set.
        SIGNED[:-1] + " \n",
        f"{TEXT}\n— example.com/log {base64.b64encode(b'1234').decode()}\n",
        SIGNED.replace("3\n", "3\t\n"),
        SIGNED.replace("3\n", "3\0\n"),
        SIGNED.replace("3\n", "3\ud800\n"),
        f"{TEXT}\n{LINE * 101}",
        "x" * 1_000_000 + SIGNED,
    ],
    ids=lambda text: repr(text[-20:]),
)
def test_malformed_notes(malformed: str) -> None:
    with pytest.raises(Finding, match=r"^note: (not lines|no signature|a signature line)"):
        note.open_note(malformed, [signer().verifier])


def test_a_note_at_the_bound_is_opened_and_one_beyond_it_is_not() -> None:
    longest = "x" * (note.MAX_NOTE_CHARACTERS - len(note.sign_note("\n", [signer()]))) + "\n"
    signed = note.sign_note(longest, [signer()])
    assert len(signed) == note.MAX_NOTE_CHARACTERS
    assert note.open_note(signed, [signer().verifier])[0] == longest
    with pytest.raises(Finding, match="not lines of text"):
        note.open_note(note.sign_note("x" + longest, [signer()]), [signer().verifier])
    many = note.sign_note(TEXT, [signer("a" * 500 + f"/{number}") for number in range(note.MAX_SIGNATURES)])
    assert note.open_note(many, [signer("a" * 500 + "/7").verifier])[0] == TEXT  # all signatures that may be, fit


@pytest.mark.parametrize("text", ["", "no newline", "carriage\r\n", "nul\0\n", "surrogate\udc00\n"])
def test_texts_that_cannot_be_signed(text: str) -> None:
    with pytest.raises(UsageError):
        note.sign_note(text, [signer()])


def test_a_note_needs_a_signer() -> None:
    with pytest.raises(UsageError):
        note.sign_note(TEXT, [])


# Cosignatures, and several keys on one note.

# A checkpoint that a public log of certificates published, with cosignatures of public witnesses.
REAL = (
    "arche2025h1.staging.ct.transparency.dev\n1432088532\nU7WM79jrzyhGZ5/GUBTpM7NzwdyfFx61t3RovgcC4Ro=\n\n"
    "— arche2025h1.staging.ct.transparency.dev zTM8sQAAAZ5W0WdjBAMARjBEAiBjW5IQf9pvsYLfQFX6hoGREPMHbdQ3urbllzalApkptQIg"
    "IpwtEroeW2BXaHAI4kJXFbon5Ch9MNL5zRNZ55lvGt0=\n"
    "— arche2025h1.staging.ct.transparency.dev ui8GwCF1+kWqZrxGdhj4aX3gcw7XUlXQQabg/27lefwhUkzbC3NygNI75MdhL1bfTW9g8Ei5"
    "9RA23oHP7Ry1k3ZFWwQ=\n"
    "— transparency.dev/DEV:witness-little-garden 2AQqhwAAAABqEiEgzgFIqqhbUoDwjMWE6UP8nd8/KYTzwZ2rhIgcqoXHAwVkjZr4Ascyl"
    "P3v7sEodkRAErumC2q44vdgJY096st5BQ==\n"
    "— witness1.smartit.nu/witness1 pIyCDwAAAABqEiEghIp82KWebrw7/oHQwlTAm3g2RKS4+eebl8eO0WH+/iEcxZ75W3u5hNI7TOQtmJbqmNW"
    "VuE0tgh0XwzdZsDsUAQ==\n"
    "— remora.n621.de 2net5wAAAABqEiEgPlfF3V06o0Y+fHM+J5J9s27wgxxcOVSpZ/2g/KSiXCg9DEZI+aVCIobWX9sXTynk5XeU/zZ0WBxtqB0Dr"
    "AWfBw==\n"
    "— witness.stagemole.eu Z/euoAAAAABqEiEgw0i+7g2ENfDAWHmtRzCfKTHSDwYDJA2NmKeGi9Y8FtEyOUvVr+AJmIY/2TUFucgKi7lI7cUiOvK"
    "FYe/TmN9DAg==\n"
)
REAL_VKEY = "arche2025h1.staging.ct.transparency.dev+ba2f06c0+AU0vHmlGCS/PdN8b2OaGmKprLI8HKM+dJ472xgFYh15f"
REAL_WITNESSES = [
    "transparency.dev/DEV:witness-little-garden+d8042a87+BCtusOxINQNUTN5Oj8HObRkh2yHf/MwYaGX4CPdiVEPM",
    "witness1.smartit.nu/witness1+a48c820f+BPSFWg9G6KPiO7QPryYO5Xq4oYJJ+kAvLKLSimDhoxMO",
    "remora.n621.de+da77ade7+BOvN63jn/bLvkieywe8R6UYAtVtNbZpXh34x7onlmtw2",
    "witness.stagemole.eu+67f7aea0+BEqSG3yu9YrmcM3BHvQYTxwFj3uSWakQepafafpUqklv",
]
WITNESS = signer("example.com/w1", bytes(32))
WITNESS_KEY = WitnessKey.of(WITNESS.name, WITNESS.verifier.public)


def cosigned(*times_s: int) -> str:
    lines = [note.cosignature_line(TEXT, WITNESS, time_s) for time_s in times_s]
    return note.sign_note(TEXT, [signer()]) + "".join(lines)


def test_a_public_checkpoint_and_its_public_witnesses() -> None:
    found = note.cosignatures_of(REAL, [WitnessKey.parse(vkey) for vkey in REAL_WITNESSES])
    assert [(one.key.vkey, one.time_s) for one in found] == [(vkey, 0x6A122120) for vkey in REAL_WITNESSES]
    assert "".join(one.line for one in found) == REAL[REAL.index("— transparency.dev/DEV") :]
    log = Verifier.parse(REAL_VKEY)
    assert note.read_checkpoint(REAL.encode(), [log]) == note.claimed_checkpoint(REAL.encode())
    for witness in REAL_WITNESSES:
        with pytest.raises(Finding, match="cosignature of"):
            note.cosignatures_of(REAL.replace("1432088532", "1432088533"), [WitnessKey.parse(witness)])


def test_what_a_cosignature_signs() -> None:
    line = note.cosignature_line(TEXT, WITNESS, 1_679_315_147)
    data = base64.b64decode(line.removeprefix("— example.com/w1 ").removesuffix("\n"))
    assert data[:4] == WITNESS_KEY.key_id
    assert data[4:12].hex() == "00000000641850cb"
    assert data[12:] == WITNESS.sign(b"cosignature/v1\ntime 1679315147\n" + TEXT.encode())


def test_a_witness_key_and_a_log_key_are_never_each_other() -> None:
    assert WITNESS_KEY.key_id != WITNESS.verifier.key_id
    assert WitnessKey.parse(WITNESS_KEY.vkey) == WITNESS_KEY
    with pytest.raises(UsageError, match="not an Ed25519 verifier key"):
        Verifier.parse(WITNESS_KEY.vkey)
    with pytest.raises(UsageError, match="not an Ed25519 witness key"):
        WitnessKey.parse(WITNESS.verifier.vkey)
    with pytest.raises(Finding, match="no known key"):
        note.open_note(TEXT + "\n" + note.cosignature_line(TEXT, WITNESS, 1), [WITNESS.verifier])
    assert note.cosignatures_of(note.sign_note(TEXT, [WITNESS]), [WITNESS_KEY]) == []


def test_a_witness_counts_once_with_its_newest_time() -> None:
    signed = cosigned(7, 9, 8)
    found = note.cosignatures_of(signed, [WITNESS_KEY, WITNESS_KEY])
    assert [(one.key, one.time_s) for one in found] == [(WITNESS_KEY, 9)]
    assert note.open_note(signed, [signer().verifier]) == (TEXT, ["example.com/log"])
    assert note.cosignatures_of(signed, [WitnessKey.of("example.com/w2", bytes(32))]) == []


def test_a_known_witness_bad_cosignature_refuses_the_note() -> None:
    good = base64.b64decode(note.cosignature_line(TEXT, WITNESS, 5).split(" ")[2])
    moved = base64.b64encode(good[:11] + b"\6" + good[12:]).decode()
    for signed in (
        cosigned(5).replace("\n3\n", "\n4\n"),
        cosigned(5) + f"— example.com/w1 {moved}\n",
        cosigned(5, 0),
        cosigned(5, 1 << 63),
        note.sign_note(TEXT, [signer()]) + f"— example.com/w1 {base64.b64encode(good[:9]).decode()}\n",
    ):
        with pytest.raises(Finding, match=r"cosignature of example\.com/w1 is wrong"):
            note.cosignatures_of(signed, [WITNESS_KEY])


def test_two_keys_that_share_name_and_key_id() -> None:
    """A key id has four bytes: who can make 2^32 keys has another key of the same."""
    mine, other = signer().verifier, signer(seed=bytes(32))
    same = Verifier(mine.name, mine.key_id, other.verifier.public)
    forged = base64.b64encode(mine.key_id + other.sign(TEXT.encode())).decode()
    with pytest.raises(Finding, match="is wrong"):
        note.open_note(f"{TEXT}\n— {mine.name} {forged}\n", [mine])
    with pytest.raises(UsageError, match="two keys of"):
        note.open_note(SIGNED, [mine, same])
    with pytest.raises(UsageError, match="two keys of"):
        note.cosignatures_of(SIGNED, [WITNESS_KEY, WitnessKey(WITNESS_KEY.name, WITNESS_KEY.key_id, bytes(32))])


def test_keys_of_one_name_are_told_apart() -> None:
    """As in a rotation: old and new sign under the log's name."""
    old, new = signer(), signer(seed=bytes(32))
    signed = note.sign_note(TEXT, [old, new])
    assert note.signers_of(signed, [new.verifier, old.verifier]) == (TEXT, [old.verifier, new.verifier])
    assert note.read_checkpoint(signed.encode(), [new.verifier]) == Checkpoint.parse(TEXT)


def test_a_key_in_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "key"
    made = note.load_or_create_key(path, "example.com/log")
    line = path.read_text()
    for text in (line, line.removesuffix("\n")):
        found = note.signer_from_environment("THE_KEY", {"THE_KEY": text})
        assert found.verifier == made.verifier
        assert found.sign(b"x") == made.sign(b"x")
        assert line[-30:-2] not in repr(found)


@pytest.mark.parametrize("damage", [lambda line: line[:-9], lambda line: line * 2, lambda line: line + "x" * 5000])
def test_a_malformed_variable_is_refused_and_not_shown(tmp_path: Path, damage: Callable[[str], str]) -> None:
    note.load_or_create_key(tmp_path / "key", "example.com/log")
    text = damage((tmp_path / "key").read_text())
    with pytest.raises(UsageError, match="THE_KEY does not hold") as caught:
        note.signer_from_environment("THE_KEY", {"THE_KEY": text})
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert text[50:70] not in shown
    with pytest.raises(UsageError, match="THE_KEY is not set"):
        note.signer_from_environment("THE_KEY", {})
