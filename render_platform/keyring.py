"""Keys by role, and how one takes the place of another: what the log itself says about who may sign.

A rotation is a `key` entry. Its subject is a signed note that names role, old, new and recovery key, and carries the
signatures of all three: whoever pinned one of them follows the chain, and a thief of one alone cannot make it. What
holds, for a tree of some size (for an attestation: the size that its entry's index + 1 is):

- below the rotation's size the old key alone may sign, during the overlap both, after it the new key alone;
- a rotation holds from the size that it names, and never before the tree that has its entry;
- a rotation that lacks a signature, skips a key or brings one back is a finding, and is not followed.

`Keyring` is pure. `LogKeys` is what a sequencer asks. The rest opens signers, and puts key files in their places.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from render_platform import canonical
from render_platform.canonical import digest_of
from render_platform.entries import FIRST_PREVIOUS, AuditEntry, parse
from render_platform.errors import Finding, Missing, SequencerStopped, Unavailable, UsageError
from render_platform.note import (
    Checkpoint,
    Signer,
    Verifier,
    load_key,
    load_or_create_key,
    read_checkpoint,
    sign_note,
    signer_from_environment,
    signers_of,
)
from render_platform.objects import sync_folder

ROLES = ("checkpoint", "attestation", "gateway")
HEADER = "render-platform/key-rotation/v1"
MAX_ROTATION_BYTES = 16_384
_FIELDS = ("role", "old", "new", "recovery", "from_size", "overlap")
_END = 1 << 63

ReadBlob = Callable[[str], bytes]
"""The bytes of a digest, verified: `Cas.get`."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """That `new` takes the place of `old` from a tree of `from_size` on; both hold for `overlap` sizes. Or Finding."""

    role: str
    old: Verifier
    new: Verifier
    recovery: Verifier
    from_size: int
    overlap: int

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise Finding(f"the rotation is of {self.role!r}: roles are {', '.join(ROLES)}")
        if self.old.name != self.new.name or self.old.key_id == self.new.key_id:
            raise Finding("the rotation's new key is not another key of the old one's name")
        if self.recovery.name == self.old.name or self.recovery.public in (self.old.public, self.new.public):
            raise Finding("the rotation's recovery key is not a third key, of another name")
        if not (0 <= self.from_size < _END and 0 <= self.overlap < _END):
            raise Finding("the rotation's size or overlap is out of range")

    @property
    def keys(self) -> tuple[Verifier, Verifier, Verifier]:
        return self.old, self.new, self.recovery

    def text(self) -> str:
        """What is signed: the header's line, and a line of canonical JSON."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        values |= {name: values[name].vkey for name in ("old", "new", "recovery")}
        return f"{HEADER}\n{canonical.encode(values).decode()}\n"

    @classmethod
    def open(cls, note: str, *, draft: bool = False) -> Rotation:
        """The rotation that `note` holds, signed by old, new and recovery key, in this order and by nobody else.

        A draft lacks the recovery key's signature. Finding where it is anything else.
        """
        text, _, lines = note.partition("\n\n")
        rotation = cls._parse(text + "\n")
        expected = rotation.keys[:2] if draft else rotation.keys
        signed, keys = signers_of(note, rotation.keys)
        if signed != rotation.text() or tuple(keys) != expected or lines.count("\n") != len(expected):
            raise Finding("the rotation is not signed by the old, the new and the recovery key, once each")
        return rotation

    @classmethod
    def _parse(cls, text: str) -> Rotation:
        header, _, line = text.partition("\n")
        if header != HEADER:
            raise Finding(f"the note is no rotation: its first line is not {HEADER}")
        values = canonical.decode(line.removesuffix("\n").encode(errors="replace"))
        numbers = all(type(values.get(name)) is int for name in ("from_size", "overlap"))
        texts = all(type(values.get(name)) is str for name in ("role", "old", "new", "recovery"))
        if not (tuple(values) == _FIELDS and numbers and texts):
            raise Finding("the rotation does not have its fields, in their order and of their types")
        try:
            keys = {name: Verifier.parse(values[name]) for name in ("old", "new", "recovery")}
        except UsageError as error:
            raise Finding(f"the rotation names a key that is none: {error.message}") from error
        return cls(**{**values, **keys})


def propose(rotation: Rotation, old: Signer, new: Signer) -> str:
    """The rotation as a draft, signed by old and new: what is carried to the recovery key."""
    if (old.verifier, new.verifier) != (rotation.old, rotation.new):
        raise UsageError("these are not the keys that the rotation names", "give the old and the new key")
    return sign_note(rotation.text(), [old, new])


def countersign(draft: str, recovery: Signer) -> str:
    """The draft with the recovery key's signature; Finding where the draft is not signed by old and new."""
    rotation = Rotation.open(draft, draft=True)
    if recovery.verifier != rotation.recovery:
        raise UsageError(f"the draft names the recovery key {rotation.recovery.vkey}", "sign it with that one")
    return draft + sign_note(rotation.text(), [recovery]).removeprefix(rotation.text() + "\n")


def key_entry(note: str) -> tuple[AuditEntry, bytes]:
    """The draft of a rotation's entry, and the blob that it binds. `batch_id` is `<role>/<key id of the new key>`."""
    rotation, blob = Rotation.open(note), note.encode()
    name = f"{rotation.role}/{rotation.new.key_id.hex()}"
    draft = AuditEntry(
        type="key",
        batch_id=name,
        previous=FIRST_PREVIOUS,
        subject_digest=digest_of(blob),
        subject_size=len(blob),
    )
    return draft, blob


@dataclass(frozen=True, slots=True)
class Pinned:
    """What a verifier was given beforehand: keys by role, and the recovery key. Any of them may be missing."""

    keys: Mapping[str, Sequence[Verifier]] = field(default_factory=dict)
    recovery: Verifier | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """`key` may sign for trees of the sizes [start, end); no end: it is in force."""

    key: Verifier
    start: int
    end: int | None


@dataclass(frozen=True, slots=True)
class KeyProblem:
    """`index` is the entry's; None where a pinned key is what does not fit."""

    index: int | None
    what: str


@dataclass(frozen=True, slots=True)
class Keyring:
    """Which keys may sign, by role and tree size.

    `recovery` is the pinned key, or the one that the first rotation names: then only the old key vouches for it.
    """

    spans: Mapping[str, tuple[Span, ...]]
    recovery: Verifier | None
    problems: tuple[KeyProblem, ...]

    @classmethod
    def from_entries(cls, entries: Iterable[tuple[int, AuditEntry]], pinned: Pinned, read: ReadBlob) -> Keyring:
        """From the log's entries with their indexes, in their order; other types than `key` are passed over."""
        spans: dict[str, tuple[Span, ...]] = {}
        recovery, problems = pinned.recovery, []
        for index, entry in entries:
            if entry.type != "key":
                continue
            try:
                rotation = _rotation_of(entry, read)
                if recovery not in (None, rotation.recovery):
                    raise Finding("the rotation is not signed by the recovery key that is pinned, or was named before")
                spans[rotation.role] = _extended(spans.get(rotation.role, ()), rotation, index)
                recovery = rotation.recovery
            except (Finding, Missing) as error:
                problems.append(KeyProblem(index, error.message))
        for role, keys in pinned.keys.items():
            known = [span.key for span in spans.get(role, ())]
            foreign = [key.vkey for key in keys if known and key not in known]
            if foreign:
                what = f"the pinned {role} key {foreign[0]} is not among those that the log's rotations name"
                problems.append(KeyProblem(None, what))
            if not known and len({key.name for key in keys}) < len(keys):
                what = f"several {role} keys of one name are pinned, and no rotation links them: pin one"
                problems.append(KeyProblem(None, what))
            if foreign or not known:
                spans[role] = tuple(Span(key, 0, None) for key in keys)
        return cls(spans, recovery, tuple(problems))

    def allowed(self, role: str, size: int) -> list[Verifier]:
        """The keys that may sign for a tree of `size`; none where no key of the role is known."""
        return [s.key for s in self.spans.get(role, ()) if s.start <= size and (s.end is None or size < s.end)]

    def read_checkpoint(self, data: bytes) -> Checkpoint:
        """The checkpoint in `data`, signed by a key that may sign a tree of its size; or Finding."""
        known = [span.key for span in self.spans.get("checkpoint", ())]
        if not known:
            raise Finding("no key of the log is pinned, and no rotation names one", "pin the log's key")
        checkpoint = read_checkpoint(data, known)
        allowed = self.allowed("checkpoint", checkpoint.size)
        if not any(key in allowed for key in signers_of(data.decode(), known)[1]):
            raise Finding(f"checkpoint: signed by a key that may not sign a tree of {checkpoint.size}")
        return checkpoint


def _rotation_of(entry: AuditEntry, read: ReadBlob) -> Rotation:
    """Finding where the entry is not exactly the one that its subject gives."""
    if entry.subject_digest is None or (entry.subject_size or 0) > MAX_ROTATION_BYTES:
        raise Finding("the key entry binds no rotation")
    note = read(entry.subject_digest).decode(errors="replace")
    if replace(entry, previous=FIRST_PREVIOUS) != key_entry(note)[0]:
        raise Finding("the key entry does not say what its rotation says")
    return Rotation.open(note)


def _extended(spans: tuple[Span, ...], rotation: Rotation, index: int) -> tuple[Span, ...]:
    spans = spans or (Span(rotation.old, 0, None),)
    last, start = spans[-1], max(rotation.from_size, index + 1)
    if rotation.old != last.key:
        raise Finding(f"the rotation replaces {rotation.old.vkey}, which is not the {rotation.role} key in force")
    if any(rotation.new.public == span.key.public or rotation.new.key_id == span.key.key_id for span in spans):
        raise Finding("the rotation brings a retired key back")
    if start < last.start:
        raise Finding("the rotation takes effect before the one that it follows")
    return (*spans[:-1], replace(last, end=start + rotation.overlap), Span(rotation.new, start, None))


class LogKeys:
    """Whose keys a sequencer holds, and which of them sign a checkpoint of some size.

    The first of `signers` gives the log's name. Others of that name are keys that come or go by a rotation; those of
    other names sign every checkpoint too. `entries` gives (index, bytes) of the log's key entries as SQL has them.
    """

    def __init__(
        self, signers: Sequence[Signer], entries: Callable[[], Sequence[tuple[int, bytes]]], read: ReadBlob
    ) -> None:
        self._signers = signers
        self._entries = entries
        self._read = read
        self._last: tuple[Sequence[tuple[int, bytes]], Keyring] | None = None

    @property
    def origin(self) -> str:
        return self._signers[0].name

    def signers(self, size: int) -> list[Signer]:
        """Those who sign a checkpoint of `size`; SequencerStopped where no key at hand may."""
        allowed = self.keyring().allowed("checkpoint", size)
        found = [one for one in self._signers if one.name != self.origin or one.verifier in allowed]
        if not any(one.name == self.origin for one in found):
            raise SequencerStopped(
                f"no key at hand may sign a checkpoint of {size} entries",
                "the log's key was rotated: start this program again, with the key that the log names",
            )
        return found

    def read_checkpoint(self, data: bytes) -> Checkpoint:
        return self.keyring().read_checkpoint(data)

    def keyring(self) -> Keyring:
        entries = self._entries()
        if self._last is None or self._last[0] != entries:  # three signatures a rotation: checked once a process
            pinned = Pinned({"checkpoint": [self._signers[0].verifier]})
            parsed = [(index, parse(data)) for index, data in entries]
            self._last = entries, Keyring.from_entries(parsed, pinned, self._read)
        found = self._last[1]
        if any(problem.index is None for problem in found.problems):
            raise SequencerStopped(
                "the log's rotations do not name the key at hand",
                "the key is another log's, or the database an older copy: run `render-platform recover`",
            )
        return found


def log_rotation(
    note: str, keyring: Keyring, size: int, put: Callable[[bytes], str], append: Callable[[AuditEntry], int]
) -> int:
    """Put a rotation into the log; gives its index. Harmless to repeat.

    `keyring` and `size` are the log's as it stands. UsageError for a rotation that a verifier would not follow.
    """
    draft, blob = key_entry(note)
    rotation = Rotation.open(note)
    spans = keyring.spans.get(rotation.role, ())
    if not any(span.key == rotation.new for span in spans):
        try:
            if keyring.recovery not in (None, rotation.recovery):
                raise Finding("the rotation names another recovery key than the last one")
            _extended(spans, rotation, size)
        except Finding as error:
            raise UsageError(error.message, "make the rotation from the key in force") from error
    put(blob)
    # A crash before this: a blob that nothing names, and the old key in force. After it: the new key is the log's, and
    # `settle_key_files` puts its file into its place at the next start.
    return append(draft)


# Signers and key files.


def open_signers(source: str, path: Path) -> list[Signer]:
    """The signers of a role: empty for the file at `path`, and its retiring key if there is one.

    Otherwise a list, separated by commas, the first in force: `file:<path>`, `env:<variable>`, or
    `python:<module>:<function>`, whose function takes nothing and gives a Signer. UsageError where one is none.
    """
    if not source:
        retiring = retiring_path(path)
        return [load_key(path), *([load_key(retiring)] if retiring.exists() else [])]
    return [_open_signer(one.strip()) for one in source.split(",")]


def _open_signer(source: str) -> Signer:
    kind, _, rest = source.partition(":")
    if kind == "file" and rest:
        return load_key(Path(rest))
    if kind == "env" and rest:
        return signer_from_environment(rest)
    module, _, function = rest.partition(":")
    if kind != "python" or not (module and function):
        raise UsageError("a signer is neither file:, env: nor python:", "see docs/spec/keys-and-witness.md")
    try:
        signer: Signer = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{source}: {type(error).__name__}", "give python:<module>:<function>") from error
    return signer


def next_path(path: Path) -> Path:
    """Where the key that will take over waits."""
    return path.with_name(f"{path.name}.next")


def retiring_path(path: Path) -> Path:
    """Where the key that was replaced stays until its overlap is over."""
    return path.with_name(f"{path.name}.retiring")


def draft_rotation(role: str, path: Path, recovery: Verifier, size: int, overlap: int) -> str:
    """A draft by which a new key, made beside the file at `path`, takes over from a tree of `size` + 1 on.

    The log goes on under the old key until the rotation is logged. Made again, it is of the same new key.
    """
    if retiring_path(path).exists():
        raise UsageError(f"{retiring_path(path)} is still in its overlap", "rotate again when it is over")
    old = load_key(path)
    new = load_or_create_key(next_path(path), old.name)
    try:
        rotation = Rotation(role, old.verifier, new.verifier, recovery, size + 1, overlap)
    except Finding as error:
        raise UsageError(error.message, "give the role's own key file, and the offline recovery key") from error
    return propose(rotation, old, new)


def settle_key_files(role: str, path: Path, keyring: Keyring, size: int) -> None:
    """Put the files of a role's keys where the log says that they belong, in a tree of `size`. Safe to repeat.

    Whoever opens the role's file calls this first: it finishes a rotation that a crash left between log and file.
    """
    spans = {span.key: span for span in keyring.spans.get(role, ())}
    coming, going = next_path(path), retiring_path(path)
    try:
        _drop_retired(spans, going, size)
        if coming.exists() and (span := spans.get(load_key(coming).verifier)) and span.start <= size:
            if not going.exists():
                os.link(path, going)  # A crash after this: the old key stands under both names; the repeat goes on.
            coming.replace(path)  # A crash after this: both files are in their places.
            sync_folder(path.parent)
            _drop_retired(spans, going, size)
    except OSError as error:
        raise Unavailable(f"key file {path}: {error.strerror}", "check the folder's permissions") from error


def _drop_retired(spans: Mapping[Verifier, Span], path: Path, size: int) -> None:
    span = spans.get(load_key(path).verifier) if path.exists() else None
    if span is not None and span.end is not None and span.end <= size:
        path.unlink()
        sync_folder(path.parent)
