"""Signed notes: the published vector, the rules of C2SP signed-note and tlog-checkpoint, and the key file."""

from __future__ import annotations

import base64
import stat
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from render_platform import note
from render_platform.errors import Finding, PlatformError, Unavailable, UsageError
from render_platform.note import Checkpoint, FileSigner, Verifier

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


@given(st.integers(0, (1 << 63) - 1), st.binary(min_size=32, max_size=32))
def test_checkpoints_come_back(size: int, root: bytes) -> None:
    checkpoint = Checkpoint("example.com/log", size, root)
    assert Checkpoint.parse(checkpoint.text()) == checkpoint
    signed = note.sign_note(checkpoint.text(), [signer()]).encode()
    assert note.read_checkpoint(signed, [signer().verifier]) == checkpoint


def test_the_text_of_a_checkpoint() -> None:
    assert Checkpoint("example.com/log", 3, bytes(32)).text() == TEXT


@pytest.mark.parametrize(
    "text",
    [
        "",
        TEXT[:-1],
        TEXT + "\n",
        TEXT + "extension\n",
        TEXT.replace("example.com/log", ""),
        TEXT.replace("\n3\n", "\n03\n"),
        TEXT.replace("\n3\n", "\n+3\n"),
        TEXT.replace("\n3\n", "\n-3\n"),
        TEXT.replace("\n3\n", "\n3_0\n"),
        TEXT.replace("\n3\n", "\n 3\n"),
        TEXT.replace("\n3\n", "\n٣\n"),
        TEXT.replace("\n3\n", "\n²\n"),
        TEXT.replace("\n3\n", "\n\n"),
        TEXT.replace("\n3\n", f"\n{1 << 63}\n"),
        TEXT.replace("\n3\n", "\n" + "9" * 5000 + "\n"),
        TEXT.replace("=", ""),
        TEXT.replace("A=", "B="),
        TEXT.replace("AAAA", "", 1),
        TEXT.replace("\nAAAA", "\nAAAAAAAA"),
        TEXT.replace("\nAAA", "\n-_A"),
        TEXT.replace("\n", "\r\n"),
    ],
    ids=repr,
)
def test_other_checkpoints_are_refused(text: str) -> None:
    with pytest.raises(Finding, match=r"^checkpoint"):
        Checkpoint.parse(text)


@pytest.mark.parametrize(
    ("origin", "size", "root"),
    [
        ("", 1, bytes(32)),
        ("a\nb", 1, bytes(32)),
        ("a", -1, bytes(32)),
        ("a", 1 << 63, bytes(32)),
        ("a", 1, b""),
    ],
)
def test_checkpoints_that_cannot_be(origin: str, size: int, root: bytes) -> None:
    with pytest.raises(Finding, match=r"^checkpoint"):
        Checkpoint(origin, size, root)


def test_the_origin_must_be_a_name_that_signed() -> None:
    witness = signer("example.com/witness", bytes(32))
    signed = note.sign_note(TEXT, [signer(), witness]).encode()
    assert note.read_checkpoint(signed, [witness.verifier, signer().verifier]).size == 3
    with pytest.raises(Finding, match="known key of its origin"):
        note.read_checkpoint(signed, [witness.verifier])


def test_bytes_that_are_not_utf8() -> None:
    with pytest.raises(Finding, match="UTF-8"):
        note.read_checkpoint(SIGNED.encode() + b"\xff", [signer().verifier])


def test_a_key_file_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "log" / "checkpoint.key"
    made = note.load_or_create_key(path, "example.com/log")
    again = note.load_or_create_key(path, "another.example/name")
    assert made.verifier == again.verifier
    assert made.name == again.name == "example.com/log"
    assert again.sign(b"data") == made.sign(b"data")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in path.parents[:2]} == {0o700}
    assert names_in(path.parent) == ["checkpoint.key"]
    start, private, name, identity, key = path.read_text().removesuffix("\n").split("+", 4)
    assert (start, private, name) == ("PRIVATE", "KEY", "example.com/log")
    assert identity == made.verifier.key_id.hex()
    assert (len(base64.b64decode(key)), base64.b64decode(key)[0]) == (33, 1)


def test_two_keys_differ(tmp_path: Path) -> None:
    keys = {note.load_or_create_key(tmp_path / name, "same").verifier.public for name in "ab"}
    assert len(keys) == 2


def test_all_who_create_at_once_get_the_same_key(tmp_path: Path) -> None:
    for turn in range(10):
        path = tmp_path / str(turn) / "key"
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _, at=path: note.load_or_create_key(at, "n").verifier, range(8)))
        assert len(set(found)) == 1
        assert names_in(path.parent) == ["key"]


def test_the_one_who_comes_second_takes_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    first = note.load_or_create_key(path, "first")
    note._create_key(path, signer("second"))
    assert note.load_or_create_key(path, "second").verifier == first.verifier
    assert names_in(tmp_path) == ["key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o620])
def test_a_key_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    note.load_or_create_key(path, "example.com/log")
    path.chmod(mode)
    with pytest.raises(UsageError, match="others") as caught:
        note.load_or_create_key(path, "example.com/log")
    assert "chmod 600" in caught.value.remedy


GOOD = note._private_line(signer()).decode()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n",
        GOOD + "\n",
        GOOD * 2,
        " " + GOOD,
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("PRIVATE", "PUBLIC"),
        GOOD.replace("example.com/log", "example.com/other"),
        GOOD.replace("example.com/log", ""),
        GOOD.replace("example.com/log", "example.com log"),
        GOOD[:-2],
        GOOD[:-6] + "\n",
        GOOD.replace("+AW", "+BW"),
        "x" * 5000,
        signer().verifier.vkey,
    ],
    ids=range(15),
)
def test_a_malformed_key_file_is_refused_and_not_shown(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content, newline="")
    path.chmod(0o600)
    with pytest.raises(UsageError, match="not an Ed25519 key") as caught:
        note.load_or_create_key(path, "example.com/log")
    assert caught.value.remedy
    assert path.read_bytes() == content.encode()
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert not [part for part in secrets_of(SEED) if part in shown]


def test_a_key_file_of_other_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"\xff\0" + GOOD.encode())
    path.chmod(0o600)
    with pytest.raises(UsageError, match="not an Ed25519 key"):
        note.load_or_create_key(path, "example.com/log")


def test_a_path_that_cannot_be_a_key_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path, tmp_path / "file" / "key", tmp_path / "link"):
        with pytest.raises(Unavailable, match="key file") as caught:
            note.load_or_create_key(path, "example.com/log")
        assert caught.value.remedy


def test_a_name_that_cannot_be_a_key_name_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="key name"):
        note.load_or_create_key(tmp_path / "keys" / "key", "has space")
    assert names_in(tmp_path) == []


def test_the_seed_is_never_shown() -> None:
    ours = signer()
    errors: list[PlatformError] = []
    for text in ("", GOOD):
        with pytest.raises(UsageError) as caught:
            note.sign_note(text.removesuffix("\n"), [ours])
        errors.append(caught.value)
    with pytest.raises(UsageError) as refused:
        Verifier.parse(GOOD)
    shown = " ".join(f"{item} {item!r} {vars(item)}" for item in (ours, *errors, refused.value))
    assert ours.verifier.vkey in repr(ours)
    assert not [part for part in secrets_of(SEED) if part in shown]
