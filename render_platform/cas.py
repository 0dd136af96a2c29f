"""The content-addressed store: `sha256/<2>/<62>`. Content is its address; other bytes are never returned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import structlog

from render_platform.canonical import digest_of
from render_platform.errors import DigestMismatch, Unavailable, UsageError
from render_platform.objects import ObjectStore

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PATH = re.compile(r"sha256/([0-9a-f]{2})/([0-9a-f]{62})")

_log = structlog.get_logger()


def path_of(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise UsageError(f"{digest!r} is not a digest", "give 64 lower-case hexadecimal digits")
    return f"sha256/{digest[:2]}/{digest[2:]}"


def digest_at(path: str) -> str | None:
    """The digest that an object's name promises; None for a name that the CAS does not give."""
    match = _PATH.fullmatch(path)
    return match[1] + match[2] if match else None


class Cas:
    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def put(self, data: bytes) -> str:
        """Store `data` and give its digest. Durable, read back and rehashed when it returns; harmless to repeat.

        Bytes that stand under the name and do not match it are moved to quarantine and replaced.
        """
        digest = digest_of(data)
        path = path_of(digest)
        # A crash before create: nothing stands. After it: an object that nothing names yet; the repeat finds it.
        if not self._objects.create(path, data) and self._objects.read(path) != data:
            moved = self._objects.move_aside(path)
            _log.error("cas_quarantined", digest=digest, moved_to=moved)
            self._objects.create(path, data)
        if digest_of(self._objects.read(path)) != digest:
            raise Unavailable(f"blobs/{path}: what was written does not read back", "check the disk or the store")
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes, verified. Missing where there are none; DigestMismatch where others stand there."""
        data = self._objects.read(path_of(digest))
        if digest_of(data) != digest:
            raise DigestMismatch(f"blobs/{path_of(digest)}", "its bytes do not have the digest that names it")
        return data

    def find_missing(self, digests: Iterable[str]) -> list[str]:
        """Those of `digests` that are not stored; presence only, no rehash."""
        stored = set(self.digests())
        return [digest for digest in digests if digest not in stored]

    def digests(self) -> Iterator[str]:
        for path in self._objects.names("sha256/"):
            if digest := digest_at(path):
                yield digest
