"""S3 when it fails: an answer that is none is Unavailable, never Missing and never empty. What goes over the wire."""

from __future__ import annotations

import base64
import hashlib
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from render_platform.cas import Cas, collect_orphans
from render_platform.clock import DAY_US, ManualClock, SystemClock, SystemIds
from render_platform.errors import Missing, SequencerStopped, Unavailable, UsageError
from render_platform.objects import ObjectStore, Stat, check_store
from tests.conformance import s3_server
from tests.conformance.s3_server import in_bucket, open_s3
from tests.gateway.servers import free_port


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.use_credentials(monkeypatch)


Answer = tuple[int, dict[str, str], bytes]
NO_KEY: Answer = (404, {}, b"<Error><Code>NoSuchKey</Code></Error>")
NO_BUCKET: Answer = (404, {}, b"<Error><Code>NoSuchBucket</Code></Error>")


@dataclass
class Scripted:
    """A server that answers as it is told: `answers` in turn, then the last one for good. None: it hangs up;
    an Event: it waits for it. A Content-Length of its own makes a body that is cut short."""

    url: str = ""
    answers: list[Answer | threading.Event | None] = field(default_factory=list)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def next(self) -> Answer | threading.Event | None:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@contextmanager
def scripted() -> Iterator[Scripted]:
    told = Scripted()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            names = {name.lower(): value for name, value in self.headers.items()}
            told.requests.append((self.command, self.path, names))
            answer = told.next()
            self.close_connection = True
            if isinstance(answer, threading.Event):
                answer.wait(30)
            elif answer is not None:
                status, headers, body = answer
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_DELETE = handle_any

        def log_message(self, *_args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def fake() -> Iterator[Scripted]:
    with scripted() as told:
        yield told


def quick(endpoint: str, **options: Any) -> ObjectStore:
    """A store that waits half a second, and tries twice."""
    pytest.importorskip("s3fs", reason="S3 NOT CHECKED: s3fs is not installed")
    from render_platform.s3 import Limits

    return open_s3("s3://bucket/prefix", endpoint, limits=Limits(connect_s=0.5, read_s=0.5, attempts=2), **options)


@dataclass(frozen=True)
class Seen:
    size: int = 1
    modified_us: int = 0
    version: str = "v"


CALLS: dict[str, Callable[[ObjectStore], object]] = {
    "create": lambda store: store.create("a", b"x"),
    "read": lambda store: store.read("a"),
    "replace nothing": lambda store: store.replace("a", b"x", None),
    "replace": lambda store: store.replace("a", b"x", b"y"),
    "names": lambda store: list(store.names()),
    "stats": lambda store: list(store.stats("a/")),
    "stat": lambda store: store.stat("a"),
    "delete": lambda store: store.delete("a", Seen()),
    "find_missing": lambda store: Cas(store).find_missing(["a" * 64]),
    "find_missing of many": lambda store: Cas(store).find_missing([f"{n:064x}" for n in range(1_001)]),
}
READ_A_BODY = ["read", "replace", "names", "stats", "find_missing of many"]


def refused(call: str, store: ObjectStore) -> Unavailable:
    with pytest.raises(Unavailable) as error:
        CALLS[call](store)
    assert type(error.value) is Unavailable, "not Missing"
    assert error.value.remedy
    assert s3_server.SECRET not in "".join(traceback.format_exception(error.value))
    return error.value


def all_refused(store: ObjectStore) -> None:
    """Each call in a thread of its own: they wait for their second attempts together."""
    with ThreadPoolExecutor(len(CALLS)) as pool:
        list(pool.map(lambda call: refused(call, store), CALLS))


def test_nobody_listens() -> None:
    all_refused(quick(f"http://127.0.0.1:{free_port()}"))


FAULTS: dict[str, Answer | None] = {
    "500": (500, {}, b"<Error><Code>InternalError</Code></Error>"),
    "503": (503, {}, b"<Error><Code>SlowDown</Code></Error>"),
    "a plain 500": (500, {}, b"oops"),
    "403": (403, {}, b"<Error><Code>AccessDenied</Code></Error>"),
    "no bucket": NO_BUCKET,
    "another's 404": (404, {"Content-Type": "text/html"}, b"<html>not found</html>"),
    "a redirect": (301, {"Location": "/elsewhere"}, b""),
    "hung up": None,
    "cut short": (200, {"Content-Length": "1000", "ETag": '"1"'}, b"<ListBucketResult><Name>bucket</Name>"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_is_none(fake: Scripted, fault: str) -> None:
    store = quick(fake.url)
    fake.answers = [FAULTS[fault]]
    for call in READ_A_BODY if fault == "cut short" else CALLS:
        fake.requests.clear()
        refused(call, store)
        assert len(fake.requests) <= 2 * 8, "attempts are bounded: two, of eight objects at once"


def test_a_store_that_does_not_answer(fake: Scripted) -> None:
    answer_later = threading.Event()
    fake.answers = [answer_later]
    all_refused(quick(fake.url))
    answer_later.set()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html></html>",
        b"<ListBucketResult><Name>bucket</Name></ListBucketResult>",
        b"<ListBucketResult><Name>other</Name><IsTruncated>false</IsTruncated></ListBucketResult>",
        b"<ListBucketResult><Name>bucket</Name><IsTruncated>true</IsTruncated></ListBucketResult>",
    ],
    ids=["empty", "a page", "no end", "another bucket", "cannot go on"],
)
def test_a_listing_that_is_none_is_not_empty(fake: Scripted, body: bytes) -> None:
    fake.answers = [(200, {"Content-Type": "application/xml"}, body)]
    refused("names", quick(fake.url))


def test_a_listing_goes_on_to_its_end(fake: Scripted) -> None:
    def page(key: str, more: str) -> Answer:
        found = f"<Contents><Key>prefix/{key}</Key><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified>"
        return 200, {}, f"<L><Name>bucket</Name>{found}</Contents>{more}</L>".encode()

    truncated = "<IsTruncated>true</IsTruncated><NextContinuationToken>next</NextContinuationToken>"
    fake.answers = [page("b", truncated), page("a", "<IsTruncated>false</IsTruncated>")]
    assert list(quick(fake.url).names()) == ["a", "b"]
    assert "continuation-token=next" in fake.requests[1][1]
    fake.answers = [page("b", truncated)]
    refused("names", quick(fake.url))


def test_only_the_stores_own_word_is_missing(fake: Scripted) -> None:
    fake.answers = [NO_KEY]
    with pytest.raises(Missing):
        quick(fake.url).read("a")
    fake.answers = [(404, {}, b""), (200, {}, b"")]  # no such key, and the bucket is there
    with pytest.raises(Missing):
        quick(fake.url).stat("a")


def test_a_create_is_one_put_with_its_digest_and_condition(fake: Scripted) -> None:
    fake.answers = [(200, {}, b""), (200, {"ETag": '"1"'}, b"data")]
    assert quick(fake.url).create("sha256/ab", b"data") is True
    (method, path, headers), (back, _path, _headers) = fake.requests
    assert (method, path, back) == ("PUT", "/bucket/prefix/sha256/ab", "GET")
    assert headers["if-none-match"] == "*"
    assert headers["x-amz-checksum-sha256"] == base64.b64encode(hashlib.sha256(b"data").digest()).decode()
    assert "x-amz-object-lock-mode" not in headers


def test_what_reads_back_differently_is_unavailable(fake: Scripted) -> None:
    fake.answers = [(200, {}, b""), (200, {"ETag": '"1"'}, b"other")]
    refused("create", quick(fake.url))


class FixedIds:
    def random(self, size: int) -> bytes:
        return bytes(size)


STANDS: Answer = (412, {}, b"<Error><Code>PreconditionFailed</Code></Error>")


@pytest.mark.parametrize(("writer", "ours"), [("0" * 32, True), ("1" * 32, False), ("", False)])
def test_a_write_whose_answer_was_lost_is_known_again(fake: Scripted, writer: str, ours: bool) -> None:
    """The first attempt did it, and its answer was lost; the second is told that something stands."""
    head: Answer = (200, {"x-amz-meta-writer": writer, "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}, b"")
    body: Answer = (200, {"ETag": '"1"'}, b"x")
    fake.answers = [None, STANDS, head, body]
    assert quick(fake.url, ids=FixedIds()).create("a", b"x") is ours
    fake.answers = [(200, {"ETag": '"1"'}, b"y"), None, STANDS, head]
    store = quick(fake.url, ids=FixedIds())
    if ours:
        store.replace("a", b"x", b"y")
    else:
        with pytest.raises(SequencerStopped):
            store.replace("a", b"x", b"y")
    assert fake.requests[-2][2]["if-match"] == '"1"'


def test_writes_that_collide_are_tried_again_a_few_times(fake: Scripted) -> None:
    conflict: Answer = (409, {}, b"<Error><Code>ConditionalRequestConflict</Code></Error>")
    fake.answers = [conflict, conflict, (200, {}, b""), (200, {"ETag": '"1"'}, b"x")]
    assert quick(fake.url).create("a", b"x") is True
    fake.answers = [conflict]
    refused("create", quick(fake.url))


@pytest.mark.parametrize(
    "url", ["", "bucket/prefix", "s3://", "s3://b", "s3://key:secret@bucket/x", "s3://bucket/../x", "s3://bucket/a?b"]
)
def test_what_is_no_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError) as error:
        open_s3(url, "http://127.0.0.1:9")
    assert "secret" not in str(error.value)


# Against real servers.


def test_a_wrong_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = s3_server.seaweed().endpoint
    s3_server.use_credentials(monkeypatch, secret="a wrong one")
    store = open_s3("s3://plain/wrong", endpoint)
    for call in CALLS:
        error = refused(call, store)
        assert "a wrong one" not in "".join(traceback.format_exception(error))


def test_a_bucket_that_is_not_there() -> None:
    """SeaweedFS makes it with the first write: reads alone are refused."""
    store = open_s3("s3://nowhere/x", s3_server.seaweed().endpoint)
    for call in ("read", "replace", "names", "stats", "stat", "delete", "find_missing", "find_missing of many"):
        refused(call, store)


def test_the_server_checks_the_digest() -> None:
    s3 = s3_server.client(s3_server.seaweed().endpoint)
    wrong = base64.b64encode(bytes(32)).decode()
    with pytest.raises(s3.exceptions.ClientError):
        s3.put_object(Bucket="plain", Key="wrong", Body=b"data", ChecksumSHA256=wrong)


def test_a_store_that_overwrites_is_refused() -> None:
    store = open_s3("s3://plain/x", s3_server.rclone().endpoint)
    with pytest.raises(UsageError, match="overwrite") as error:
        check_store(store, SystemIds(), "s3://plain/x")
    assert "If-None-Match" in error.value.remedy


def test_retention_is_set_where_the_bucket_has_it(tmp_path: Path) -> None:
    clock = SystemClock()
    for bucket, locks in (("locked", True), ("versioned", False), ("plain", False)):
        store = in_bucket(bucket, retention_days=3)(tmp_path)
        assert getattr(store, "object_lock") is locks  # noqa: B009
        digest = Cas(store).put(b"evidence")
        Cas(store).put(b"evidence")
        store.replace("checkpoint", b"1", None)
        s3 = s3_server.client(s3_server.seaweed().endpoint)
        found = s3.list_object_versions(Bucket=bucket)["Versions"]
        kept: dict[str, list[tuple[str, datetime]]] = {}
        for one in found:
            head = s3.head_object(Bucket=bucket, Key=one["Key"], VersionId=one["VersionId"])
            if until := head.get("ObjectLockRetainUntilDate"):
                kept.setdefault(one["Key"].rpartition("/")[2], []).append((head["ObjectLockMode"], until))
        if not locks:
            assert not kept
            continue
        assert set(kept) >= {digest[2:]}
        assert "checkpoint" not in kept
        for mode, until in kept[digest[2:]]:
            days = (until - datetime.fromtimestamp(clock.now_us() / 1e6, UTC)).total_seconds() / 86_400
            assert mode == "COMPLIANCE"
            assert 2.9 < days <= 3
        assert len(kept[digest[2:]]) == 2, "locked again when it was put again"


class Aged:
    """A store whose objects were written eight days before they were."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def stat(self, path: str) -> Stat:
        found = self._objects.stat(path)
        return Seen(found.size, found.modified_us - 8 * DAY_US, found.version)

    def stats(self, prefix: str = "") -> Iterator[tuple[str, Stat]]:
        yield from ((name, self.stat(name)) for name in self._objects.names(prefix))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)


@pytest.mark.parametrize(("bucket", "goes"), [("plain", True), ("versioned", True), ("locked", False)])
def test_orphans_go_but_for_what_is_locked(tmp_path: Path, bucket: str, goes: bool) -> None:
    store = in_bucket(bucket, retention_days=3)(tmp_path)
    named, orphan = Cas(store).put_many([b"named", b"orphan"])
    clock = ManualClock(SystemClock().now_us() + DAY_US // 2)
    outcome = collect_orphans(Aged(store), {named}.__contains__, clock, plan=False)
    assert (len(outcome.removed), len(outcome.spared)) == (int(goes), int(not goes))
    assert Cas(store).find_missing([named, orphan]) == [orphan] * goes
