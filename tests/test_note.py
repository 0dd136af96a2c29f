"""Signed notes: the published vector, the rules of C2SP signed-note and tlog-checkpoint, and the key file."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from render_platform import note
from render_platform.errors import Finding, UsageError
from render_platform.note import FileSigner, Verifier

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


@pytest.mark.parametrize("text", ["", "no newline", "carriage\r\n", "nul\0\n", "surrogate\udc00\n"])
def test_texts_that_cannot_be_signed(text: str) -> None:
    with pytest.raises(UsageError):
        note.sign_note(text, [signer()])


def test_a_note_needs_a_signer() -> None:
    with pytest.raises(UsageError):
        note.sign_note(TEXT, [])
