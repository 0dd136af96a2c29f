"""More of test_note.py: key files."""

from __future__ import annotations

import base64
import stat
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform import note
from render_platform.errors import Finding, PlatformError, Unavailable, UsageError
from render_platform.note import Checkpoint, Verifier
from tests.test_note import SEED, SIGNED, TEXT, names_in, secrets_of, signer


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
