"""Signed notes, checkpoints and their cosignatures: C2SP signed-note, tlog-checkpoint and tlog-cosignature, Ed25519.

- what is signed is the text with its last newline, without the blank line that follows it;
- a signature line is `— <name> base64(keyID[4] || signature)`, with U+2014 and single spaces;
- unknown keys are ignored, each (name, key id) counts once, a known key's bad signature refuses the note;
- a witness's cosignature (0x04) says when it was made; neither its key nor a log's (0x01) can stand in for the other;
- a private key lives in a file of its owner's alone or in the environment, and never in an error, a repr or a log.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, Self, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from render_platform.errors import Finding, Unavailable, UsageError
from render_platform.objects import make_folders, sync_folder

MAX_NOTE_CHARACTERS = 65_536
MAX_SIGNATURES = 100
MAX_KEY_FILE_BYTES = 4096
_ED25519 = b"\x01"
_COSIGNATURE = b"\x04"
_DASH = "— "
_UNFIT = re.compile(r"[\x00-\x09\x0b-\x1f\ud800-\udfff]")


@dataclass(frozen=True)
class Checkpoint:
    """A log's size and root (C2SP tlog-checkpoint); Finding where a field cannot stand in its line."""

    origin: str
    size: int
    root: bytes

    def __post_init__(self) -> None:
        if not _is_text(self.origin + "\n") or "\n" in self.origin or not self.origin:
            raise Finding("checkpoint: the origin is not one line of text")
        if not 0 <= self.size < 1 << 63 or len(self.root) != 32:
            raise Finding("checkpoint: the size or the root is out of range")

    def text(self) -> str:
        """Origin, decimal size and base64 root, each with its newline."""
        return f"{self.origin}\n{self.size}\n{_base64(self.root)}\n"

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """The inverse of `text`; Finding for anything else, extension lines too: this log has none."""
        lines = text.split("\n")
        if len(lines) != 4 or len(lines[1]) > 19 or not lines[1].isdecimal():
            raise Finding("checkpoint: not the three lines origin, size and root")
        found = cls(lines[0], int(lines[1]), _unbase64(lines[2]) or b"")
        if found.text() != text:
            raise Finding("checkpoint: encoding what it says gives other text")
        return found


@dataclass(frozen=True)
class PublicKey:
    """A public key under its name: what a verifier must be given beforehand."""

    ALGORITHM: ClassVar[bytes]
    KIND: ClassVar[str]
    name: str
    key_id: bytes
    public: bytes

    @classmethod
    def of(cls, name: str, public: bytes) -> Self:
        """The key of 32 bytes under `name`, with the key id that both give."""
        return cls(name, key_id(name, public, cls.ALGORITHM), public)

    @classmethod
    def parse(cls, vkey: str) -> Self:
        """The key of `name+hex(key id)+base64(algorithm || public)`; UsageError where it is not exactly that."""
        name, _, rest = vkey.partition("+")
        key = _unbase64(rest.partition("+")[2]) or b""
        if not (_is_name(name) and len(key) == 33 and key[:1] == cls.ALGORITHM):
            raise UsageError(f"not an Ed25519 {cls.KIND} key", "give it as <name>+<key id>+<base64>, on one line")
        found = cls.of(name, key[1:])
        if found.vkey != vkey:
            raise UsageError(f"the {cls.KIND} key of {name} has another key id", "copy the whole key again")
        return found

    @property
    def vkey(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{_base64(self.ALGORITHM + self.public)}"

    def verifies(self, data: bytes, signature: bytes) -> bool:
        """Whether `signature` is this key's Ed25519 signature of `data`."""
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, data)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class Verifier(PublicKey):
    """The key of who signs notes: a log's, for one."""

    ALGORITHM = _ED25519
    KIND = "verifier"


@dataclass(frozen=True)
class WitnessKey(PublicKey):
    """The key of a witness, for cosignatures alone."""

    ALGORITHM = _COSIGNATURE
    KIND = "witness"


@dataclass(frozen=True)
class Cosignature:
    """A witness's word that, at `time_s` (seconds since 1970), the checkpoint was the log's largest consistent one."""

    key: WitnessKey
    time_s: int
    line: str


class Signer(Protocol):
    """Signs with a key that it keeps to itself: a file, or a key service of the user's."""

    @property
    def name(self) -> str: ...

    @property
    def verifier(self) -> Verifier: ...

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature of `data`."""
        ...


class FileSigner:
    """A Signer whose key this process holds; UsageError where `name` cannot be a key name."""

    def __init__(self, name: str, key: Ed25519PrivateKey) -> None:
        if not _is_name(name):
            raise UsageError("not a key name", "use a name without spaces and '+', such as example.com/log")
        self._key = key
        self._verifier = Verifier.of(name, key.public_key().public_bytes_raw())

    @property
    def name(self) -> str:
        return self._verifier.name

    @property
    def verifier(self) -> Verifier:
        return self._verifier

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"FileSigner({self._verifier.vkey})"


def key_id(name: str, public: bytes, algorithm: bytes = _ED25519) -> bytes:
    """The four bytes that tell one name's keys apart (C2SP signed-note)."""
    return hashlib.sha256(name.encode() + b"\n" + algorithm + public).digest()[:4]


def sign_note(text: str, signers: Sequence[Signer]) -> str:
    """`text`, a blank line and one signature line a signer; UsageError where that would not be a note."""
    if not _is_text(text) or not signers:
        raise UsageError("not a note: no signer, or not lines of text", "end the text with a newline")
    lines = [_signature_line(signer, text.encode()) for signer in signers]
    return text + "\n" + "".join(lines)


def open_note(note: str, verifiers: Sequence[Verifier]) -> tuple[str, list[str]]:
    """The text of `note`, and the names of the keys among `verifiers` that signed it, each key once.

    Finding where it is malformed, where a known key's signature is bad, and where no known key signed.
    """
    text, keys = signers_of(note, verifiers)
    return text, [key.name for key in keys]


def signers_of(note: str, verifiers: Sequence[Verifier]) -> tuple[str, list[Verifier]]:
    """As `open_note`, with the keys themselves."""
    text, signatures = _split(note)
    known = _by_identity(verifiers)
    seen: dict[Verifier, None] = {}
    for name, identity, signature in signatures:
        verifier = known.get((name, identity))
        if verifier is None:
            continue
        if not verifier.verifies(text.encode(), signature):
            raise Finding(f"note: the signature of {name} is wrong")
        seen[verifier] = None
    if not seen:
        raise Finding("note: no known key has signed it")
    return text, list(seen)


def cosignature_line(text: str, signer: Signer, time_s: int) -> str:
    """The witness `signer`'s cosignature of a checkpoint's text, as a signature line with its newline."""
    key = WitnessKey.of(signer.name, signer.verifier.public)
    signed = time_s.to_bytes(8, "big") + signer.sign(_cosigned(text, time_s))
    return f"{_DASH}{key.name} {_base64(key.key_id + signed)}\n"


def cosignatures_of(note: str, witnesses: Sequence[WitnessKey]) -> list[Cosignature]:
    """The cosignatures of `witnesses` on `note`, each key's newest alone, in the order of their keys' first lines.

    Finding where the note is malformed, and where a known witness's cosignature is bad. Does not ask who signed the
    note itself.
    """
    text, signatures = _split(note)
    known = _by_identity(witnesses)
    found: dict[WitnessKey, Cosignature] = {}
    for name, identity, payload in signatures:
        key = known.get((name, identity))
        if key is None:
            continue
        time_s = int.from_bytes(payload[:8], "big")
        if not (0 < time_s < 1 << 63 and key.verifies(_cosigned(text, time_s), payload[8:])):
            raise Finding(f"note: the cosignature of {name} is wrong")
        if key not in found or found[key].time_s < time_s:
            found[key] = Cosignature(key, time_s, f"{_DASH}{name} {_base64(identity + payload)}\n")
    return list(found.values())


def read_checkpoint(data: bytes, verifiers: Sequence[Verifier]) -> Checkpoint:
    """The checkpoint that `data` holds, signed by the known key that has its origin as name; or Finding."""
    text, names = open_note(_decoded(data), verifiers)
    checkpoint = Checkpoint.parse(text)
    if checkpoint.origin not in names:
        raise Finding(f"checkpoint: not signed by the known key of its origin {checkpoint.origin}")
    return checkpoint


def claimed_checkpoint(data: bytes) -> Checkpoint:
    """The checkpoint that `data` holds, whoever signed it: for choosing the keys to check it with. Or Finding."""
    return Checkpoint.parse(_split(_decoded(data))[0])


def signer_from_environment(variable: str, environ: Mapping[str, str] | None = None) -> FileSigner:
    """The key in a variable that holds the line of a key file; UsageError where it does not, without showing it."""
    text = (os.environ if environ is None else environ).get(variable, "")
    signer = _parse_private(text.encode(errors="replace")) if len(text) <= MAX_KEY_FILE_BYTES else None
    if signer is None:
        state = "does not hold an Ed25519 key on one line" if text else "is not set"
        raise UsageError(f"the variable {variable} {state}", "set it to the one line of a key file")
    return signer


def load_or_create_key(path: Path, name: str) -> FileSigner:
    """The key in the file at `path`, made under `name` if there is none; an existing one keeps its own name.

    The file is `PRIVATE+KEY+<name>+<key id>+<base64>` on one line, mode 0600, and durable on return. Two
    processes that create it at once both get the same key. UsageError where others can reach it or it is
    malformed, Unavailable where it cannot be read or written.
    """
    try:
        if not path.exists():
            _create_key(path, FileSigner(name, Ed25519PrivateKey.generate()))
        signer = _load_key(path)
        sync_folder(path.parent)  # Whoever made it: nothing may be signed with a key that a crash could lose.
        return signer
    except OSError as error:
        raise Unavailable(f"key file {path}: {error.strerror}", "check the path and its permissions") from error


def load_key(path: Path) -> FileSigner:
    """The key in the file at `path`; UsageError where there is none, and as in `load_or_create_key`."""
    if not path.exists():
        raise UsageError(f"{path} is not there", "start what signs with it once")
    try:
        return _load_key(path)
    except OSError as error:
        raise Unavailable(f"key file {path}: {error.strerror}", "check the path and its permissions") from error


def _create_key(path: Path, signer: FileSigner) -> None:
    make_folders(path.parent, mode=0o700)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(_private_line(signer))
            file.flush()
            os.fsync(file.fileno())
        # The commit point: a crash before it leaves a temporary file with a key that nothing has used.
        os.link(temporary, path)
    except FileExistsError:
        pass  # Another process was first: its key is the key.
    finally:
        temporary.unlink(missing_ok=True)


def _load_key(path: Path) -> FileSigner:
    with path.open("rb") as file:
        if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
            raise UsageError(f"key file {path}: others can reach it", f"chmod 600 {path}, and rotate the key")
        data = file.read(MAX_KEY_FILE_BYTES)
    signer = _parse_private(data)
    if signer is None:
        raise UsageError(f"key file {path}: not an Ed25519 key on one line", "restore it from a copy")
    return signer


def _parse_private(data: bytes) -> FileSigner | None:
    """None where `data` is no key; raising here could carry the key into a traceback."""
    parts = data.removesuffix(b"\n").decode(errors="replace").split("+", 4)
    key = _unbase64(parts[-1]) or b""
    if len(parts) != 5 or len(key) != 33 or not _is_name(parts[2]):
        return None
    signer = FileSigner(parts[2], Ed25519PrivateKey.from_private_bytes(key[1:]))
    return signer if _private_line(signer) == data.removesuffix(b"\n") + b"\n" else None


def _private_line(signer: FileSigner) -> bytes:
    key = _base64(_ED25519 + signer._key.private_bytes_raw())
    return f"PRIVATE+KEY+{signer.name}+{signer.verifier.key_id.hex()}+{key}\n".encode()


def _signature_line(signer: Signer, data: bytes) -> str:
    return f"{_DASH}{signer.name} {_base64(signer.verifier.key_id + signer.sign(data))}\n"


def _split(note: str) -> tuple[str, list[tuple[str, bytes, bytes]]]:
    """The text, and (name, key id, signature) of each signature line; the last blank line divides them."""
    text, blank, rest = note.rpartition("\n\n")
    if not blank or not _is_text(note) or len(note) > MAX_NOTE_CHARACTERS:
        raise Finding("note: not lines of text, a blank line and signatures")
    lines = rest.split("\n")[:-1]
    if not 1 <= len(lines) <= MAX_SIGNATURES:
        raise Finding("note: no signature line, or too many")
    return text + "\n", [_parse_signature(line) for line in lines]


def _parse_signature(line: str) -> tuple[str, bytes, bytes]:
    name, space, encoded = line.removeprefix(_DASH).partition(" ")
    data = _unbase64(encoded) or b""
    if not (line.startswith(_DASH) and space and _is_name(name) and len(data) > 4):
        raise Finding("note: a signature line is malformed")
    return name, data[:4], data[4:]


_Key = TypeVar("_Key", bound=PublicKey)


def _by_identity(keys: Iterable[_Key]) -> dict[tuple[str, bytes], _Key]:
    """UsageError where two keys share name and key id: nobody could tell which of them a line is of."""
    known: dict[tuple[str, bytes], _Key] = {}
    for key in keys:
        if known.setdefault((key.name, key.key_id), key) != key:
            raise UsageError(f"two keys of {key.name} have the key id {key.key_id.hex()}", "give one of them")
    return known


def _cosigned(text: str, time_s: int) -> bytes:
    """What a cosignature signs (C2SP tlog-cosignature, v1)."""
    return f"cosignature/v1\ntime {time_s}\n{text}".encode()


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Finding("note: not UTF-8") from error


def _is_text(text: str) -> bool:
    """Whether `text` is UTF-8 lines without control characters, the last one ended too."""
    return text.endswith("\n") and _UNFIT.search(text) is None


def _is_name(name: str) -> bool:
    return bool(name) and "+" not in name and _is_text(name + "\n") and not any(map(str.isspace, name))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unbase64(text: str) -> bytes | None:
    """The bytes of padded standard base64; None for anything that `_base64` would not give."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if _base64(data) == text else None
