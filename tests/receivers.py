"""What receives alerts in tests: web servers, mail servers and slow ones, on loopback ports; with TLS if asked."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import queue
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Tls(NamedTuple):
    server: ssl.SSLContext
    client: ssl.SSLContext
    """Trusts the server's certificate, and no other."""


def certificate(folder: Path) -> Tls:
    """A certificate of its own for 127.0.0.1."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    pem, file = made.public_bytes(serialization.Encoding.PEM), folder / "certificate.pem"
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    file.write_bytes(pem + key.private_bytes(serialization.Encoding.PEM, *form))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file)
    return Tls(server, ssl.create_default_context(cadata=pem.decode()))


class Request(NamedTuple):
    path: str
    headers: dict[str, str]
    document: dict[str, Any]


class Receiver:
    """A web server that keeps what is posted to it, and answers `statuses` in turn, the last one for ever."""

    def __init__(self, statuses: Sequence[int] = (200,), tls: Tls | None = None, headers: Sequence[str] = ()) -> None:
        self.requests: list[Request] = []
        self.statuses = list(statuses)
        self.on_request: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        receiver, extra = self, [line.split(": ", 1) for line in headers]

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with receiver._lock:
                    receiver.requests.append(Request(self.path, dict(self.headers), json.loads(body)))
                    status = receiver.statuses[min(len(receiver.requests), len(receiver.statuses)) - 1]
                receiver.on_request()
                with suppress(OSError):  # whoever asked may be gone
                    self.send_response(status)
                    for name, value in extra:
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(b"ok")

            do_GET = do_POST

            def log_message(self, *_args: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls:
            self._server.socket = tls.server.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.02])

    @property
    def documents(self) -> list[dict[str, Any]]:
        return [request.document for request in self.requests]

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Mail(NamedTuple):
    sender: str
    recipients: list[str]
    message: EmailMessage
    tls: bool
    login: str | None


class MailServer:
    """A real SMTP server. It refuses recipients at `refuse`; where `login` is set, mail without it."""

    def __init__(
        self, tls: Tls | None = None, implicit: bool = False, login: tuple[str, str] | None = None, refuse: str = "-"
    ) -> None:
        self.mails: queue.SimpleQueue[Mail] = queue.SimpleQueue()
        self._refuse = refuse
        self.port = free_port()

        def authenticate(_server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
            given = isinstance(data, LoginPassword) and (data.login.decode(), data.password.decode())
            return AuthResult(success=given == login, handled=False, auth_data=data)

        options: dict[str, Any] = {"tls_context": tls.server} if tls and not implicit else {}
        if login:
            options |= {"authenticator": authenticate, "auth_required": True, "auth_require_tls": False}
        self._controller = Controller(
            self, "127.0.0.1", self.port, ssl_context=tls.server if tls and implicit else None, **options
        )

    async def handle_RCPT(self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any) -> str:
        if address.endswith(self._refuse):
            return "550 nobody here"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        message = message_from_bytes(envelope.content, policy=policy.default)
        who = session.auth_data.login.decode() if session.auth_data else None
        tls = server.transport.get_extra_info("sslcontext") is not None
        self.mails.put(Mail(envelope.mail_from, list(envelope.rcpt_tos), message, tls, who))
        return "250 taken"

    def __enter__(self) -> MailServer:
        self._controller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._controller.stop()


class SlowServer:
    """Says one byte of `text` after the other, `every_s`, for as long as somebody listens."""

    def __init__(self, text: bytes, every_s: float = 0.05) -> None:
        self._text, self._every_s, self._ends = text, every_s, threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        with suppress(OSError):
            while not self._ends.is_set():
                connection, _ = self._listener.accept()
                with connection, suppress(OSError):
                    for byte in self._text:
                        if self._ends.wait(self._every_s):
                            return
                        connection.sendall(bytes([byte]))

    def __enter__(self) -> SlowServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
