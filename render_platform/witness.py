"""Witnesses (C2SP tlog-witness): one that cosigns only what extends all it has cosigned, and a log's side of it.

`POST /add-checkpoint` brings `old <size>`, a consistency proof, a blank line and a signed checkpoint. The answer is

- 200 and the cosignature's line; what was cosigned is durable before;
- 409 and the size that it knows (`text/x.tlog.size`), where `old` is another; 409 and plain text for another root of
  the same size; 422 for a proof that does not hold: both mean that the log has forked;
- 404 for an origin, 403 for a key that it does not know; 400 for anything malformed, and where `old` is past the size.

A witness's word is its memory: it does not start without its state, and one that lost it needs a new key.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import fcntl
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import structlog

from render_platform import canonical, merkle
from render_platform import note as notes
from render_platform.clock import US_PER_SECOND, Clock
from render_platform.config import MAX_WITNESSES
from render_platform.errors import Finding, Missing, PlatformError, SequencerStopped, Unavailable, UsageError
from render_platform.note import Checkpoint, Cosignature, Signer, Verifier, WitnessKey
from render_platform.objects import FolderObjects, ObjectStore, make_folders

HOST = "127.0.0.1"
SIZE_TYPE = "text/x.tlog.size"
TEXT_TYPE = "text/plain; charset=utf-8"
MAX_BODY_BYTES = 64 << 10
MAX_PROOF_LINES = 63
MAX_CONNECTIONS = 32
SILENT_S = 60  # how long a witness that failed is not asked again: one that is down costs a time-out in this time
_STATE = "state.json"
_KEY = "witness.key"
_NO_LOGS = canonical.encode({"logs": []})
_OLD = re.compile(r"old (0|[1-9][0-9]{0,18})")
_STOP = {signal.SIGINT, signal.SIGTERM}
_LENGTH = re.compile(r"[0-9]{1,6}")
_SIZE = re.compile(rb"(0|[1-9][0-9]{0,18})\n")

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: str
    content_type: str = TEXT_TYPE


class _Refused(Exception):
    def __init__(self, status: int, why: str, content_type: str = TEXT_TYPE) -> None:
        self.answer = Answer(status, f"{why}\n", content_type)


class WitnessState:
    """The largest checkpoint cosigned of each log, in a file. A write of another process stops this one."""

    def __init__(self, objects: ObjectStore, data: bytes) -> None:
        self._objects = objects
        self._data = data
        try:
            logs = canonical.decode(data)["logs"]
            self._known = {x["origin"]: Checkpoint(x["origin"], x["size"], bytes.fromhex(x["root"])) for x in logs}
        except (Finding, KeyError, TypeError, ValueError) as error:
            raise Unavailable("the witness's state cannot be read", "retire this witness: make a new one") from error

    def known(self, origin: str) -> Checkpoint:
        return self._known.get(origin) or Checkpoint(origin, 0, merkle.EMPTY_ROOT)

    def advance(self, checkpoint: Checkpoint) -> None:
        """Remember `checkpoint`, durably on return."""
        known = self._known | {checkpoint.origin: checkpoint}
        logs = [{"origin": name, "size": log.size, "root": log.root.hex()} for name, log in sorted(known.items())]
        data = canonical.encode({"logs": logs})
        # A crash before this: nothing was cosigned. After it: cosigned and not answered; its log asks again from there.
        self._objects.replace(_STATE, data, self._data)
        self._known, self._data = known, data


class Witness:
    """Decides about checkpoints of `logs` (keys by origin), one at a time. For any number of threads."""

    def __init__(
        self, logs: Mapping[str, Sequence[Verifier]], signer: Signer, state: WitnessState, clock: Clock
    ) -> None:
        self.key = WitnessKey.of(signer.name, signer.verifier.public)
        self._logs = logs
        self._signer = signer
        self._state = state
        self._clock = clock
        self._lock = threading.Lock()

    def add_checkpoint(self, body: bytes) -> Answer:
        """The answer to a request's body. Unavailable where the state cannot be written: nothing is cosigned then."""
        try:
            old, proof, note = _parse_request(body)
            checkpoint = self._signed(note)
            with self._lock:
                known = self._state.known(checkpoint.origin)
                _check_extends(known, old, proof, checkpoint, note)
                if checkpoint != known:
                    self._state.advance(checkpoint)
                now_s = self._clock.now_us() // US_PER_SECOND
                return Answer(200, notes.cosignature_line(checkpoint.text(), self._signer, now_s))
        except _Refused as refused:
            return refused.answer

    def _signed(self, note: bytes) -> Checkpoint:
        try:
            origin = notes.claimed_checkpoint(note).origin
        except Finding as error:
            raise _Refused(400, error.message) from error
        if origin not in self._logs:
            raise _Refused(404, f"the log {origin} is not known here")
        try:
            return notes.read_checkpoint(note, self._logs[origin])
        except Finding as error:
            raise _Refused(403, error.message) from error


def _parse_request(body: bytes) -> tuple[int, list[bytes], bytes]:
    """The old size, the proof and the checkpoint's note."""
    head, blank, note = body.partition(b"\n\n")
    lines = head.decode(errors="replace").split("\n")
    old = _OLD.fullmatch(lines[0])
    if not blank or old is None or len(lines) > MAX_PROOF_LINES + 1:
        raise _Refused(400, "not `old <size>`, at most 63 lines of proof, a blank line and a checkpoint")
    return int(old[1]), [_hash(line) for line in lines[1:]], note


def _hash(line: str) -> bytes:
    with suppress(binascii.Error, ValueError):
        found = base64.b64decode(line, validate=True)
        if len(found) == merkle.HASH_BYTES and base64.b64encode(found).decode() == line:
            return found
    raise _Refused(400, "a line of the proof is not the base64 of a hash")


def _check_extends(known: Checkpoint, old: int, proof: list[bytes], new: Checkpoint, note: bytes) -> None:
    if old > new.size:
        raise _Refused(400, f"old is {old}, and the checkpoint's size {new.size}")
    if old != known.size:
        raise _Refused(409, str(known.size), SIZE_TYPE)
    try:
        merkle.verify_consistency(known.size, known.root, new.size, new.root, proof)
    except Finding as error:  # What the log has signed is evidence against it: whoever runs the witness must have it.
        _log.error("log_not_consistent", size=known.size, root=known.root.hex(), note=note.decode(errors="replace"))
        same_size = new.size == known.size > 0 and not proof
        raise _Refused(409 if same_size else 422, error.message) from error


def make_witness(folder: Path, name: str) -> WitnessKey:
    """A new witness's state, then its key: a key without a state is always one that has forgotten what it cosigned.

    UsageError where there is a witness in the folder, or was one.
    """
    objects, key = FolderObjects(folder), folder / _KEY
    if key.exists():
        raise UsageError("there is a witness in this folder, or was one", "start it, or make one in another folder")
    if not objects.create(_STATE, _NO_LOGS) and objects.read(_STATE) != _NO_LOGS:
        raise UsageError("the witness in this folder has lost its key", "restore it, or make one in another folder")
    return WitnessKey.of(name, notes.load_or_create_key(key, name).verifier.public)


@contextmanager
def open_witness(folder: Path, logs: Sequence[Verifier], clock: Clock) -> Iterator[Witness]:
    """The witness of `folder`, for logs by their keys; nobody else's while it is open.

    UsageError where there is none, and where it has lost its state; Unavailable where another process has it open.
    """
    by_origin: dict[str, list[Verifier]] = {}
    for log in logs:
        by_origin.setdefault(log.name, []).append(log)
    objects, key = FolderObjects(folder), folder / _KEY
    make_folders(folder, mode=0o700)
    with (folder / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state = WitnessState(objects, objects.read(_STATE))
        except BlockingIOError:
            raise Unavailable(f"the witness in {folder} runs already", "stop it first") from None
        except Missing:
            what = "the witness has lost its state: it may sign a fork" if key.exists() else "there is no witness here"
            raise UsageError(what, "make a new one, with a new key, in another folder: --init") from None
        yield Witness(by_origin, notes.load_key(key), state, clock)


class WitnessServer(ThreadingHTTPServer):
    """Answers on loopback. Bodies and connections are bounded; a process of this machine can use all of these up."""

    daemon_threads = True

    def __init__(self, witness: Witness, port: int) -> None:
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise Unavailable(f"port {port} cannot be listened on: {error.strerror}", "choose another one") from error
        self.witness = witness
        self.url = f"http://{HOST}:{self.server_port}"
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away: nobody waits for an answer."""


class _Handler(BaseHTTPRequestHandler):
    server: WitnessServer
    protocol_version = "HTTP/1.1"
    server_version = "render-platform-witness"
    sys_version = ""
    timeout = 10

    def do_POST(self) -> None:
        length = self.headers.get("content-length", "")
        if self.path != "/add-checkpoint":
            self._answer(Answer(404, "there is nothing but /add-checkpoint\n"))
        elif not (_LENGTH.fullmatch(length) and int(length) <= MAX_BODY_BYTES):
            self._answer(Answer(413, f"give a Content-Length of at most {MAX_BODY_BYTES}\n"))
        else:
            try:
                answer = self.server.witness.add_checkpoint(self.rfile.read(int(length)))
            except PlatformError as error:
                _log.error("witness_state_not_written", error=str(error))
                answer = Answer(503, "the state cannot be written: nothing was cosigned\n")
            self._answer(answer)

    def _answer(self, answer: Answer) -> None:
        body = answer.body.encode()
        self.close_connection = self.close_connection or answer.status in (404, 413)  # their bodies were not read
        self.send_response(answer.status)
        self.send_header("content-type", answer.content_type)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Requests are not logged; what is wrong with a log is."""


def serve(witness: Witness, port: int, ready: Callable[[str], None]) -> None:
    """Answer until SIGINT or SIGTERM, in a process with no other thread. Port 0 is a free one; `ready` gets the URL."""
    with WitnessServer(witness, port) as server:
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ready(server.url)
        signal.sigwait(_STOP)
        server.shutdown()


# A log's side.


@dataclass(frozen=True, slots=True)
class Member:
    """A witness that a log asks: where, and the key that its cosignatures must be of."""

    url: str
    key: WitnessKey


def parse_members(text: str) -> list[Member]:
    """Of `URL VKEY, URL VKEY`; UsageError where one is none, or stands twice."""
    members = []
    for one in filter(None, map(str.strip, text.split(","))):
        url, _, vkey = one.partition(" ")
        if not re.fullmatch(r"(https://|http://(localhost|127\.0\.0\.1|\[::1\])[:/])[^\s@]+", url):
            raise UsageError(f"{url} is not a witness's URL", "give URL VKEY, …; http only on this machine")
        members.append(Member(f"{url.rstrip('/')}/add-checkpoint", WitnessKey.parse(vkey.strip())))
    if len(members) > MAX_WITNESSES:
        raise UsageError(f"witnesses names {len(members)}", f"name at most {MAX_WITNESSES}: a note holds no more")
    if len({member.key for member in members}) < len(members):
        raise UsageError("a witness stands twice", "give each witness once")
    return members


@dataclass(frozen=True, slots=True)
class Collected:
    """`ahead`: a larger size that a witness has cosigned, or 0. `shortfall`: why the note is held back, or empty."""

    note: bytes
    ahead: int
    shortfall: str


class Witnesses:
    """Those who are asked to cosign a log's checkpoints, all at once, `timeout_s` for all.

    Below `quorum` cosignatures a checkpoint is published all the same, or held back where `policy` is `hold`.
    """

    def __init__(self, members: Sequence[Member], quorum: int, policy: str, timeout_s: int, clock: Clock) -> None:
        if not 0 <= quorum <= len(members) or policy not in ("publish", "hold"):
            raise UsageError("the witnesses' quorum or policy cannot be kept", "0 … witnesses, publish or hold")
        self._members, self._quorum, self._hold = members, quorum, policy == "hold"
        self._timeout_s, self._clock = timeout_s, clock
        self._silent_until_us: dict[WitnessKey, int] = {}

    def cosign(self, note: bytes, proof: Callable[[int], Sequence[bytes]], previous: bytes | None) -> Collected:
        """Ask for cosignatures of `note`. `proof(old)` proves that its tree extends its first `old` entries; `previous`
        is the note that stands published. SequencerStopped where a witness has seen another history of the log."""
        now_us = self._clock.now_us()
        asked = [one for one in self._members if self._silent_until_us.get(one.key, 0) <= now_us]
        with ThreadPoolExecutor(1) as thread:  # whatever loop the caller's thread runs
            replies = thread.submit(asyncio.run, self._ask(asked, note, proof, previous)).result()
        text, ahead = note.decode(), 0
        for member, reply in zip(asked, replies, strict=True):
            if isinstance(reply, Unavailable) and not isinstance(reply, SequencerStopped):
                _log.warning("witness_failed", url=member.url, why=reply.message)
                self._silent_until_us[member.key] = now_us + SILENT_S * US_PER_SECOND
            elif isinstance(reply, BaseException):
                raise reply
            elif isinstance(reply, int):
                ahead = max(ahead, reply)
            elif reply.key not in {known.key for known in notes.cosignatures_of(text, [member.key])}:
                text += reply.line
        count = len(notes.cosignatures_of(text, [member.key for member in self._members]))
        short = f"{count} of {self._quorum} witnesses cosigned" if self._hold and count < self._quorum else ""
        return Collected(text.encode(), ahead, short)

    async def _ask(self, asked: Sequence[Member], *submission: Any) -> list[Cosignature | int | BaseException]:
        import aiohttp  # 0.3 s that only a log with witnesses pays

        async def one(member: Member) -> Cosignature | int:
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await _submit(session, member, *submission)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise Unavailable(f"no answer: {type(error).__name__}") from error

        async with aiohttp.ClientSession(auto_decompress=False) as session:
            return await asyncio.gather(*map(one, asked), return_exceptions=True)


async def _submit(
    session: Any, member: Member, note: bytes, proof: Callable[[int], Sequence[bytes]], previous: bytes | None
) -> Cosignature | int:
    """The cosignature, or the larger size that the witness has cosigned. Unavailable where it gives neither."""
    size = notes.claimed_checkpoint(note).size
    old = notes.claimed_checkpoint(previous).size if previous else 0
    least = old if previous and notes.cosignatures_of(previous.decode(), [member.key]) else 0
    status, known, text = await _post(session, member, old, proof(old), note)
    if known is not None and known != old:  # once: who is asked by two at a time may have gone on again
        if known > size:
            return known
        if known < least:
            raise Unavailable(f"it has forgotten: it knows {known} entries, and has cosigned {least}")
        status, known, text = await _post(session, member, known, proof(known), note)
    if status == 422 or (status == 409 and known is None):
        raise SequencerStopped(
            f"the witness {member.key.name} has cosigned another history of this log",
            "the database and the log were restored or altered: run `render-platform verify` before anything else",
        )
    if status != 200 or not text.startswith("— ") or "\n\n" in text:
        raise Unavailable(f"it answered {status}")
    try:
        return notes.cosignatures_of(note.decode() + text, [member.key])[0]
    except (Finding, IndexError) as error:
        raise Unavailable("it gave no good cosignature of its key") from error


async def _post(
    session: Any, member: Member, old: int, proof: Sequence[bytes], note: bytes
) -> tuple[int, int | None, str]:
    """Status, the size of a 409 that has one, and the body."""
    lines = [f"old {old}", *(base64.b64encode(node).decode() for node in proof), "", ""]
    body = b""
    async with session.post(member.url, data="\n".join(lines).encode() + note, allow_redirects=False) as response:
        async for chunk in response.content.iter_chunked(4096):
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise Unavailable("its answer is too long")
        size = _SIZE.fullmatch(body) if (response.status, response.content_type) == (409, SIZE_TYPE) else None
        return response.status, int(size[1]) if size else None, body.decode(errors="replace")
