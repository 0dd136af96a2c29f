"""The proxy of the fault tests does what it says, to a server that answers with what it is sent."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tests.proxy import Proxy


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65_536):
            self.request.sendall(data)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A reset is what is tested."""


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Server(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Proxy(server.server_address[1]) as made:
            yield made
        server.shutdown()


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def ask(to: socket.socket, data: bytes = b"hello") -> bytes:
    """As much as was sent; less where the connection ends."""
    to.sendall(data)
    got = b""
    while len(got) < len(data) and (more := to.recv(65_536)):
        got += more
    return got


def test_it_passes_everything_on(proxy: Proxy) -> None:
    large = bytes(range(256)) * 4_000
    with connect(proxy) as one, connect(proxy) as other:
        assert (ask(one), ask(other, large), ask(one)) == (b"hello", large, b"hello")
        one.shutdown(socket.SHUT_WR)
        assert one.recv(1) == b"", "the end of one side reaches the other"


def test_what_is_cut_is_reset_and_refused_until_it_is_healed(proxy: Proxy) -> None:
    with connect(proxy) as one:
        assert ask(one) == b"hello"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            one.recv(1)
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
    proxy.heal()
    with connect(proxy) as again:
        assert ask(again) == b"hello"


def test_a_black_hole_answers_nobody_and_what_it_swallowed_stays_silent(proxy: Proxy) -> None:
    with connect(proxy) as before:
        assert ask(before) == b"hello"
        proxy.blackhole()
        with connect(proxy) as during:
            for one in (during, before):
                one.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    ask(one)
            proxy.heal()
            for one in (during, before):
                with pytest.raises(TimeoutError):
                    ask(one)
    with connect(proxy) as after:
        assert ask(after) == b"hello"


def test_each_piece_is_delayed(proxy: Proxy) -> None:
    with connect(proxy) as one:
        proxy.delay(150)
        begun = time.monotonic()
        assert ask(one) == b"hello"
        assert 0.3 <= time.monotonic() - begun < 3
        proxy.heal()
        begun = time.monotonic()
        assert ask(one) == b"hello"
        assert time.monotonic() - begun < 0.3


def test_an_answer_is_cut_after_so_many_bytes(proxy: Proxy) -> None:
    with connect(proxy) as one:
        assert ask(one) == b"hello"
        proxy.cut_after(8)
        assert ask(one) == b"hello", "counted from now on"
        one.sendall(b"hello")
        assert one.recv(65_536) == b"hel"
        with pytest.raises(ConnectionResetError):
            one.recv(1)
