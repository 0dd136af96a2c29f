"""Objects in an S3 bucket, through s3fs: the ObjectStore contract on `s3://bucket/prefix`.

Every write is one PUT with its SHA-256 on the wire and a condition: If-None-Match: * to create, If-Match to replace.
An answer that was lost may hide a write that was done, so each write carries a random `writer`: who is told that
something stands looks whether it is its own.

Credentials, region and endpoint come from the standard chain (AWS_* variables, shared files, the machine's role).
Messages name the object and the store's error code, never what the store or a library said.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Protocol

import fsspec
import structlog
from aiohttp import ClientError as ConnectionBroken
from botocore.exceptions import BotoCoreError
from fsspec.asyn import sync

from render_platform.clock import Clock, Ids, SystemClock, SystemIds
from render_platform.errors import Missing, SequencerStopped, Unavailable, UsageError

_SCRATCH = ".tmp/"  # listed only for those who ask for it, as in a folder
_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*)/?")
_STANDS = {"PreconditionFailed", "412"}
_CONFLICT = {"ConditionalRequestConflict", "OperationAborted", "409"}
_WRITES = 5
"""Attempts at a write that collides with another of the same name: S3 answers 409 and decides nothing."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Limits:
    """A call takes at most `call_s`, with all its attempts; an attempt may wait so long for the store."""

    connect_s: float = 5
    read_s: float = 30
    call_s: float = 120
    attempts: int = 3


@dataclass(frozen=True, slots=True)
class S3Stat:
    size: int
    modified_us: int
    version: str = ""


class _Seen(Protocol):
    @property
    def version(self) -> str: ...


class S3Objects:
    """A bucket's objects below a prefix. Opens no connection before its first call.

    `retention_days` above 0 locks what `create` writes (object lock, COMPLIANCE) where the bucket has object lock. What
    `replace` writes and the probe's objects are not locked by us. The bucket should have versioning: without it,
    `delete` may remove an object that is written again in the same instant.
    """

    def __init__(
        self,
        url: str,
        *,
        endpoint_url: str | None = None,
        retention_days: int = 0,
        limits: Limits | None = None,
        clock: Clock | None = None,
        ids: Ids | None = None,
    ) -> None:
        match = _URL.fullmatch(url)
        if not match:
            raise UsageError("the store's address is not s3://bucket/prefix", "put credentials into AWS_* variables")
        self._bucket, self._root = match[1], f"{match[2][1:]}/" if match[2] else ""
        self._url = f"s3://{self._bucket}/{self._root}"
        self._retention = timedelta(days=retention_days)
        self._limits = limits or Limits()
        self._clock = clock or SystemClock()  # the machine's: retention is real time, whatever a trace's clock says
        self._ids = ids or SystemIds()
        self._fs = fsspec.filesystem(
            "s3",
            endpoint_url=endpoint_url,
            config_kwargs={
                "connect_timeout": self._limits.connect_s,
                "read_timeout": self._limits.read_s,
                "retries": {"mode": "standard", "total_max_attempts": self._limits.attempts},
                "tcp_keepalive": True,
            },
            skip_instance_cache=True,
        )
        self._fs.retries = 1  # the client's own attempts are enough: they would multiply

    def create(self, path: str, data: bytes) -> bool:
        with self._as_unavailable(path):
            # Crash before the answer: the whole object or none. Nothing names it yet; the repeat finds it.
            if not self._put(path, data, IfNoneMatch="*", **self._lock_of(path)):
                return False
            if self._get(path)["Body"] != data:
                raise Unavailable(f"{self._url}{path}: what was written does not read back", "check the store")
            return True

    def read(self, path: str) -> bytes:
        with self._as_unavailable(path):
            data: bytes = self._get(path)["Body"]
            return data

    def replace(self, path: str, data: bytes, expected: bytes | None) -> None:
        with self._as_unavailable(path):
            standing: dict[str, Any] = {"Body": None}
            with suppress(Missing):
                standing = self._get(path)
            how = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": standing.get("ETag", "")}
            if "ObjectLockMode" in standing:  # what was locked is locked again
                how |= self._lock_of(path)
            # The store compares once more, in the same instant as it writes.
            if standing["Body"] != expected or not self._put(path, data, **how):
                raise SequencerStopped(f"{path} was changed by another writer", "run the command again")
            # No read-back here: another writer may have replaced it rightly by now.

    def names(self, prefix: str = "") -> Iterator[str]:
        for name, _stat in self.stats(prefix):
            yield name

    def stats(self, prefix: str = "") -> Iterator[tuple[str, S3Stat]]:
        with self._as_unavailable(prefix):
            found = sorted(self._listed(prefix), key=lambda one: one[0])
        yield from found

    def stat(self, path: str) -> S3Stat:
        with self._as_unavailable(path):
            return _stat_of(self._head(path))

    def delete(self, path: str, seen: _Seen) -> bool:
        with self._as_unavailable(path):
            try:
                head = self._head(path)
            except Missing:
                return False
            if _stat_of(head).version != seen.version:
                return False
            if "VersionId" not in head:
                self._call("delete_object", Key=self._root + path)
                return True
            return self._delete_versions(path, seen.version)

    @cached_property
    def object_lock(self) -> bool:
        """Does the bucket have object lock? Asked once; said in the log where retention is wanted and it has not."""
        try:
            with self._as_unavailable(""):
                answer = self._call("get_object_lock_configuration")
        except Unavailable as error:
            if _code(error.__cause__) not in {"ObjectLockConfigurationNotFoundError", "NotImplemented", "501"}:
                raise
            answer = {}
        has = bool(answer.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled") == "Enabled")
        if self._retention and not has:
            _log.warning("object_lock_off", store=self._url, remedy="enable object lock on the bucket")
        return has

    # Inside: these raise what s3fs raises, but for Missing.

    def _put(self, path: str, data: bytes, **more: Any) -> bool:
        """One object, under a condition. False: the condition does not hold."""
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        writer = self._ids.random(16).hex()
        more |= {"Body": data, "ChecksumSHA256": digest, "Metadata": {"writer": writer}}
        for _ in range(_WRITES):
            try:
                self._call("put_object", Key=self._root + path, **more)
                return True
            except OSError as error:
                code = _code(error)
                if code in _STANDS or (code == "NoSuchKey" and "IfMatch" in more):
                    return self._is_by(writer, path)
                if code not in _CONFLICT:
                    raise
        raise Unavailable(f"{self._url}{path}: {_WRITES} writes collided with others", "run the command again")

    def _is_by(self, writer: str, path: str) -> bool:
        """Was what stands there written by an attempt of ours whose answer was lost?"""
        try:
            return bool(self._head(path).get("Metadata", {}).get("writer") == writer)
        except Missing:
            return False

    def _lock_of(self, path: str) -> dict[str, Any]:
        if not self._retention or path.startswith(_SCRATCH) or not self.object_lock:
            return {}
        return {"ObjectLockMode": "COMPLIANCE", "ObjectLockRetainUntilDate": self._now() + self._retention}

    def _now(self) -> datetime:
        return _EPOCH + timedelta(microseconds=self._clock.now_us())

    def _delete_versions(self, path: str, newest: str) -> bool:
        """All versions up to `newest`: a later one is another writing, and stays. False where one is locked."""
        key = self._root + path
        listed = self._call("list_object_versions", Prefix=key).get("Versions", [])
        versions = [one["VersionId"] for one in listed if one["Key"] == key]  # the newest first
        if not versions or versions[0] != newest or any(self._is_locked(path, version) for version in versions):
            return False
        # Crash in between: the newest still stands. What is deleted last is what hides the others.
        for version in reversed(versions):
            self._call("delete_object", Key=key, VersionId=version)
        return True

    def _is_locked(self, path: str, version: str) -> bool:
        head = self._head(path, VersionId=version)
        until = head.get("ObjectLockRetainUntilDate")
        return head.get("ObjectLockLegalHoldStatus") == "ON" or (until is not None and until > self._now())

    def _get(self, path: str) -> dict[str, Any]:
        """The object: all bytes as `Body`, `ETag`, and its lock."""

        async def read_body(answer: Any) -> Any:
            async with answer["Body"] as body:
                answer["Body"] = await body.read()
            return answer

        try:
            answer = self._call("get_object", read_body, Key=self._root + path)
        except OSError as error:
            if _code(error) == "NoSuchKey":
                raise Missing(path) from None
            raise
        if len(answer["Body"]) != answer["ContentLength"]:
            raise Unavailable(f"{self._url}{path}: the answer was cut short", "run the command again")
        return answer

    def _head(self, path: str, **version: Any) -> dict[str, Any]:
        try:
            return self._call("head_object", Key=self._root + path, **version)
        except OSError as error:
            if _code(error) not in {"404", "NoSuchKey"}:
                raise
        self._call("head_bucket")  # a HEAD's 404 does not say what is missing: a bucket that is not there is no answer
        raise Missing(path)

    def _listed(self, prefix: str) -> Iterator[tuple[str, S3Stat]]:
        """Every page; an answer that is no listing is an error, and never the end."""
        more: dict[str, Any] = {}
        while True:
            answer = self._call("list_objects_v2", Prefix=self._root + prefix, **more)
            if answer.get("Name") != self._bucket or "IsTruncated" not in answer:
                raise Unavailable(f"{self._url}{prefix}: the answer is no listing", "check the endpoint")
            for found in answer.get("Contents", []):
                name = found["Key"].removeprefix(self._root)
                if not name.endswith("/") and (prefix.startswith(_SCRATCH) or not name.startswith(_SCRATCH)):
                    yield name, S3Stat(found["Size"], _us(found["LastModified"]))
            if not answer["IsTruncated"]:
                return
            if answer.get("NextContinuationToken", "") in {"", more.get("ContinuationToken")}:
                raise Unavailable(f"{self._url}{prefix}: the listing does not go on", "check the store")
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    def _call(
        self, method: str, then: Callable[[Any], Awaitable[Any]] | None = None, **arguments: Any
    ) -> dict[str, Any]:
        """One request and, on the same loop, what is done with its answer; TimeoutError after `call_s`."""

        async def request() -> Any:
            answer = await self._fs._call_s3(method, Bucket=self._bucket, **arguments)
            return await then(answer) if then else answer

        answer: dict[str, Any] = sync(self._fs.loop, request, timeout=self._limits.call_s)
        return answer

    @contextmanager
    def _as_unavailable(self, path: str) -> Iterator[None]:
        try:
            yield
        except (OSError, BotoCoreError, ConnectionBroken) as error:
            raise Unavailable(
                f"{self._url}{path}: {_code(error) or type(error).__name__}",
                "check the store, its address (AWS_ENDPOINT_URL, AWS_REGION) and the credentials' rights",
            ) from error


def _code(error: BaseException | None) -> str:
    """S3's error code, which s3fs leaves in the cause of its error; empty where the store gave none."""
    answer = getattr(error.__cause__, "response", None) if error else None
    return str(answer["Error"].get("Code", "")) if isinstance(answer, dict) and "Error" in answer else ""


def _stat_of(head: dict[str, Any]) -> S3Stat:
    modified_us = _us(head["LastModified"])
    writer = head.get("Metadata", {}).get("writer", "")
    return S3Stat(head["ContentLength"], modified_us, str(head.get("VersionId") or f"{writer}-{modified_us}"))


def _us(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)
