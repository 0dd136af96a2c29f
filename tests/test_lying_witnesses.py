"""More of test_witnessed_log.py: witnesses that answer something else than they should."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from render_platform.note import cosignature_line
from render_platform.witness import Member
from tests.test_witness import KEY, WITNESS, signer
from tests.test_witnessed_log import cosigned_by, grow, log_with, published, witnesses_of


@contextmanager
def answering(answer: Callable[[bytes], tuple[int, str, str]]) -> Iterator[Member]:
    """A witness under the key KEY that answers whatever `answer` makes of a request."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, body, kind = answer(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(status)
            self.send_header("content-type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield Member(f"http://127.0.0.1:{server.server_port}/add-checkpoint", KEY)
        server.shutdown()


def text_of(body: bytes) -> str:
    return body.decode().split("\n\n")[1] + "\n"


def note_within(body: bytes) -> str:
    """Good for the note and this together, where the note's own text has become part of another text."""
    note = body.decode().partition("\n\n")[2]
    return "— a b\n\n" + cosignature_line(note + "— a b\n", WITNESS, 7)


LIES: dict[str, Callable[[bytes], tuple[int, str, str]]] = {
    "nothing": lambda _: (200, "", "text/plain"),
    "words": lambda _: (200, "all is well\n", "text/plain"),
    "no newline": lambda body: (200, cosignature_line(text_of(body), WITNESS, 7)[:-1], "text/plain"),
    "another key": lambda body: (200, cosignature_line(text_of(body), signer(9, WITNESS.name), 7), "text/plain"),
    "another text": lambda body: (200, cosignature_line("x\n", WITNESS, 7), "text/plain"),
    "no time": lambda body: (200, cosignature_line(text_of(body), WITNESS, 0), "text/plain"),
    "a note of its own": lambda body: (200, note_within(body), "text/plain"),
    "a log's signature": lambda body: (200, f"— {WITNESS.name} AAAA\n", "text/plain"),
    "too much": lambda _: (200, "— x\n" * 100_000, "text/plain"),
    "an error": lambda _: (500, "", "text/plain"),
    "moved": lambda _: (307, "", "text/plain"),
    "unknown here": lambda _: (404, "", "text/plain"),
    "a smaller size again": lambda _: (409, "0\n", "text/x.tlog.size"),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_what_a_lying_witness_says_is_not_published(
    tmp_path: Path, lie: Callable[[bytes], tuple[int, str, str]]
) -> None:
    with answering(lie) as liar, witnesses_of(tmp_path) as members:
        grow(log_with(tmp_path, [liar, *members], quorum=1), "a", "b")
        assert cosigned_by(tmp_path, [liar, *members]) == 1
        assert published(tmp_path).count("\n— ") == 2, "the log's line and the good witness's"


def test_lines_of_unknown_keys_are_not_taken_over(tmp_path: Path) -> None:
    def answer(body: bytes) -> tuple[int, str, str]:
        lines = [cosignature_line(text_of(body), one, 7) for one in (signer(9, "example.com/x"), WITNESS)]
        return 200, "".join(lines), "text/plain"

    with answering(answer) as member:
        grow(log_with(tmp_path, [member]), "a")
        assert cosigned_by(tmp_path, [member]) == 1
        assert "example.com/x" not in published(tmp_path)


def test_who_has_cosigned_what_stands_is_asked_once_a_process(tmp_path: Path) -> None:
    asked: list[int] = []

    def answer(body: bytes) -> tuple[int, str, str]:
        asked.append(int(text_of(body).split("\n")[1]))
        return 200, cosignature_line(text_of(body), WITNESS, 7), "text/plain"

    with answering(answer) as member:
        log = log_with(tmp_path, [member])
        grow(log, "a")
        assert log.publish() is not None
        assert asked == [1]
        assert log_with(tmp_path, [member]).publish() is not None
        assert asked == [1, 1]


def test_an_endless_answer_is_cut_off(tmp_path: Path) -> None:
    with answering(LIES["too much"]) as liar, capture_logs() as said:
        grow(log_with(tmp_path, [liar], quorum=0), "a")
    assert [one["why"] for one in said] == ["its answer is too long"]
