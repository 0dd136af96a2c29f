"""Bundles for tests: made from a platform's evidence, taken apart, and packed and signed again by other means."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from render_platform.bundle import BundleVerification, make_bundle, verify_bundle
from render_platform.clock import HOUR_US
from render_platform.evidence import Evidence
from render_platform.note import Checkpoint, Verifier, sign_note
from render_platform.pipeline import Platform
from tests.factories import make_events
from tests.platforms import read_log, tree_hash
from tests.stories import HOUR, NOWHERE, MemoryObjects, finish_lane, move_to, open_story, record, said

FAR = HOUR + 300 * HOUR_US
"""An hour whose entries stand in the log's second bundle of entries."""
Parts = dict[str, bytes]
LAST = ("manifest.json", "manifest.note")


def pack(parts: Parts) -> bytes:
    """A tar by Python's own module."""
    sink = io.BytesIO()
    for name, data in parts.items():
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o444
        header = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
        if not header[329]:  # releases of Python differ: device numbers of plain files are zeros, or nothing
            header[329:345] = b"0000000\0" * 2
            header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
        sink.write(bytes(header) + data + bytes(-len(data) % 512))
    return sink.getvalue() + bytes(1024)


def unpack(data: bytes) -> Parts:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        return {one.name: archive.extractfile(one).read() for one in archive}  # type: ignore[union-attr]


@dataclass(frozen=True)
class Story:
    """A platform's evidence in memory, and a bundle of two hours of it."""

    evidence: Evidence
    signer: Any
    folder: Path
    data: bytes
    entries: list[bytes]
    checkpoints: list[Checkpoint]

    @property
    def keys(self) -> list[Verifier]:
        return [*self.evidence.log_keys, *self.evidence.attestation_keys]

    def make(self, start: int, end: int, **options: Any) -> BundleVerification:
        return make_bundle(self.evidence, self.signer, range(start, end), self.folder / "bundle.tar", **options)

    def verify(self, data: bytes, **options: Any) -> BundleVerification:
        path = self.folder / "other.tar"
        path.write_bytes(data)
        return verify_bundle(path, options.pop("keys", self.keys), **options)

    def sealed(self, parts: Parts, by: Any = None, **claims: Any) -> bytes:
        """The parts with a manifest that lists them, signed again."""
        manifest = json.loads(unpack(self.data)["manifest.json"]) | claims
        rest = {name: data for name, data in parts.items() if name not in LAST}
        manifest["members"] = [[n, len(d), hashlib.sha256(d).hexdigest()] for n, d in rest.items()]
        text = json.dumps(manifest, separators=(",", ":"))
        note = f"render-platform.dev/bundle/v1\n{hashlib.sha256(text.encode()).hexdigest()}\n"
        return pack(rest | dict(zip(LAST, (text.encode(), sign_note(note, [by or self.signer]).encode()), strict=True)))

    def cut(self, first: int, end: int) -> bytes:
        """The bundle with another part of the log, its proof made from all leaves."""
        size, nodes = len(self.entries), list[bytes]()

        def walk(start: int, stop: int) -> None:
            if stop <= first or start >= end:
                nodes.append(tree_hash(self.entries[start:stop]))
            elif stop - start > 1:
                half = start + (1 << (stop - start - 1).bit_length() - 1)
                walk(start, half)
                walk(half, stop)

        walk(0, size)
        parts, hours = unpack(self.data), range(FAR, FAR + 2 * HOUR_US)
        inside = [entry for entry in self.entries[first:end] if json.loads(entry)["recorded_hour"] in hours]
        bound = {hashlib.sha256(entry).hexdigest() for entry in inside}
        bound |= {json.loads(entry)[name] for entry in inside for name in ("subject_digest", "attestation")}
        kept = {name: data for name, data in parts.items()
                if name[:5] != "tile/" and (name[:7] != "sha256/" or name[7:].replace("/", "") in bound)}  # fmt: skip
        names = [f"{i // 256:03d}" + ("" if i + 256 <= size else f".p/{size - i}") for i in range(first, end, 256)]
        bundles = {f"tile/entries/{name}": self.evidence.log.read(f"tile/entries/{name}") for name in names}
        return self.sealed(kept | {"proof": b"".join(nodes)} | bundles, first_entry=first, end_entry=end)


def evidence_of(platform: Platform) -> Evidence:
    """A copy in memory of what a platform has published."""
    stores: Iterator[Any] = (
        MemoryObjects({name: store.read(name) for name in store.names()})
        for store in (platform.log_objects, platform.blobs)
    )
    return Evidence(next(stores), next(stores), [platform.log_signer.verifier], [platform.attestation_signer.verifier])


def make_story(folder: Path) -> Story:
    """Two lanes, two busy hours 300 hours apart, and silence; a third lane that nobody closes."""
    with closing(open_story(folder / "state", "none", dsn=NOWHERE, batch_rows=9)) as platform:
        record(platform, make_events(20, 1))
        record(platform, make_events(5, 2), "trace/1")
        finish_lane(platform, "trace/1", HOUR + 2 * HOUR_US)
        platform.flush()
        move_to(platform, FAR)
        record(platform, make_events(25, 3, FAR))
        record(platform, make_events(4, 4, FAR + HOUR_US), "trace/2")
        finish_lane(platform, "trace/2", FAR + 3 * HOUR_US)
        platform.flush()
        move_to(platform, FAR + 300 * HOUR_US)
        record(platform, make_events(4, 5, FAR + 299 * HOUR_US), "trace/3")
        platform.flush()
        evidence, by = evidence_of(platform), platform.log_signer
        checkpoints = list(platform.history())
        entries = read_log(folder / "state", checkpoints[-1].size)
    target = folder / "bundle.tar"
    outcome = make_bundle(evidence, by, range(FAR, FAR + 2 * HOUR_US), target)
    assert outcome.verdict == "verified", (said(outcome), outcome.doubts)
    return Story(evidence, by, folder, target.read_bytes(), entries, checkpoints)


def note(checkpoint: Checkpoint, by: Any) -> bytes:
    return sign_note(checkpoint.text(), [by]).encode()


def batch_of(story: Story) -> str:
    return next(name for name, data in unpack(story.data).items() if data.startswith(b"PAR1"))
