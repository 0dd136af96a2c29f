"""Where alerts go: a webhook that gets our JSON document, a webhook of Slack's shape, and e-mail.

A channel either took the alert, or it raises: Unavailable where the receiver failed or refused, UsageError where its
settings cannot be right. Addresses and logins are secrets, since whoever knows a Slack URL can post to it: errors name
the host at most, and never carry what the network library said, which quotes the address.

Elsewhere only the gateway fetches outside URLs, and no private ones, because customers choose them. Here the operator
sets the address in the configuration, next to passwords and keys: it is as trusted as the program, and the usual
receivers (a mail relay, a chat server, a pager's gateway) do stand in private networks. So any address is allowed; but
no redirect is followed, no proxy or password of the environment used, and time and answer are bounded.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import smtplib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email import policy
from email.message import EmailMessage
from email.utils import format_datetime
from typing import Any, Protocol
from urllib.parse import SplitResult, unquote, urlsplit

from render_platform.clock import US_PER_SECOND, iso
from render_platform.config import Settings
from render_platform.errors import RecordError, Unavailable, UsageError

SEVERITIES = ("warning", "error", "resolved")
TIMEOUT_S = 10.0
MAX_RECIPIENTS = 20
MAX_TITLE, MAX_TEXT, MAX_LINK = 140, 2_900, 1_000
"""Characters; Slack refuses a header of more than 150, and a section of more than 3,000."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Mail to these goes out as it is: the mail relay of this machine has rarely a certificate."""
_ADDRESS = re.compile(r"[\w!#$%&'*+/=?^`{|}~.-]{1,64}@[\w.\[\]:-]{1,255}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Alert:
    """`key` says what it is about: the same key again is the same trouble. `text` says what is wrong and what to do."""

    key: str
    severity: str
    """warning | error | resolved"""
    title: str
    text: str
    link: str
    at_us: int

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise RecordError("severity", f"{self.severity!r} is unknown", f"use one of {', '.join(SEVERITIES)}")

    @property
    def alert_id(self) -> str:
        """The same however often the alert is sent: a receiver that remembers ids acts once."""
        return hashlib.sha256(f"{self.key}\n{self.severity}\n{self.at_us}".encode()).hexdigest()[:32]

    @property
    def headline(self) -> str:
        """One line."""
        return f"{self.severity.capitalize()}: {_cut(' '.join(self.title.split()), MAX_TITLE - 10)}"


class Channel(Protocol):
    @property
    def name(self) -> str:
        """webhook | slack | email"""

    def send(self, alert: Alert) -> str:
        """What the receiver said, for people, once it has taken the alert. Unavailable or UsageError otherwise."""


def open_channels(settings: Settings, tls: ssl.SSLContext | None = None) -> list[Channel]:
    """The configured channels. Nothing is looked up or checked yet: one that cannot work says so when it sends.

    `tls` says which certificates are trusted; None: those that this machine trusts.
    """
    found: list[Channel] = []
    if settings.alert_webhook:
        found.append(HttpChannel("webhook", settings.alert_webhook, webhook_document, tls))
    if settings.alert_slack:
        found.append(HttpChannel("slack", settings.alert_slack, slack_document, tls))
    if settings.alert_email:
        recipients = [part.strip() for part in settings.alert_email.split(",") if part.strip()]
        found.append(EmailChannel(settings.smtp_url, settings.alert_from, recipients, tls))
    return found


def webhook_document(alert: Alert) -> dict[str, Any]:
    """Our own document: docs/alerts.md."""
    return {
        "version": 1,
        "type": "alert",
        "id": alert.alert_id,
        "key": alert.key,
        "severity": alert.severity,
        "title": _cut(alert.title, MAX_TITLE),
        "text": _cut(alert.text, MAX_TEXT),
        "link": alert.link,
        "at": iso(alert.at_us),
    }


def slack_document(alert: Alert) -> dict[str, Any]:
    """A message for an incoming webhook. Only the link is markup: a text can mention nobody."""
    link = alert.link[:MAX_LINK].replace("|", "%7C")
    return {
        "text": _escape(f"{alert.headline}\n{_cut(alert.text, MAX_TEXT)}\n") + _escape(link),
        "blocks": [
            {"type": "header", "text": {"type": "plain_text", "text": alert.headline}},
            {"type": "section", "text": {"type": "plain_text", "text": _cut(alert.text, MAX_TEXT) or "-"}},
            {
                "type": "context",
                "elements": [{"type": "mrkdwn", "text": f"<{_escape(link)}|Open in Dagster> · {iso(alert.at_us)}"}],
            },
        ],
    }


class HttpChannel:
    """Posts a JSON document; the receiver has taken it where it answers 200 … 299."""

    def __init__(
        self,
        name: str,
        url: str,
        document: Callable[[Alert], dict[str, Any]],
        tls: ssl.SSLContext | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.name = name
        self._url, self._document, self._tls, self._timeout_s = url, document, tls, timeout_s
        self._setting = f"RENDER_PLATFORM_ALERT_{name.upper()}"

    def send(self, alert: Alert) -> str:
        host = _split(self._setting, self._url, ("http", "https")).hostname
        status = asyncio.run(self._post(self._document(alert), str(host)))
        if 300 <= status < 400:
            raise Unavailable(f"{host} answered {status}, a redirect", f"set {self._setting} to where it leads")
        if not 200 <= status < 300:
            remedy = "it is sent again" if status == 429 or status >= 500 else f"check {self._setting}"
            raise Unavailable(f"{host} answered {status}", remedy)
        return f"{host} answered {status}"

    async def _post(self, document: dict[str, Any], host: str) -> int:
        """The status; of the answer nothing else is read."""
        import aiohttp  # here: whoever sends nothing need not wait until it is loaded

        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(ssl=self._tls or ssl.create_default_context(), force_close=True),
                    cookie_jar=aiohttp.DummyCookieJar(),
                    timeout=aiohttp.ClientTimeout(total=self._timeout_s),
                    headers={"User-Agent": "render-platform", "Accept-Encoding": "identity"},
                    auto_decompress=False,
                    trust_env=False,
                ) as session,
                session.post(self._url, json=document, allow_redirects=False) as answer,
            ):
                return answer.status
        except TimeoutError:
            raise Unavailable(f"{host} did not answer within {self._timeout_s:g} s", "check that it is up") from None
        except aiohttp.ClientConnectorCertificateError:
            raise _untrusted(host) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # without its cause: it would carry the whole URL into a traceback
            raise Unavailable(f"{host} gave no answer ({type(error).__name__})", "check that it is up") from None


class EmailChannel:
    """Sends plain text over SMTP. TLS is never given up: only to `plain` hosts does mail go without it."""

    name = "email"

    def __init__(
        self,
        smtp_url: str,
        sender: str,
        recipients: Sequence[str],
        tls: ssl.SSLContext | None = None,
        plain: frozenset[str] = LOOPBACK,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`smtps://` is TLS from the first byte, `smtp://` is STARTTLS. An empty `sender` is the first recipient."""
        self._smtp_url, self._recipients = smtp_url, list(recipients)
        self._sender = sender or next(iter(self._recipients), "")
        self._tls, self._plain, self._timeout_s = tls, plain, timeout_s

    def send(self, alert: Alert) -> str:
        target = _split("RENDER_PLATFORM_SMTP_URL", self._smtp_url, ("smtp", "smtps"))
        if not 1 <= len(self._recipients) <= MAX_RECIPIENTS:
            remedy = f"set RENDER_PLATFORM_ALERT_EMAIL to 1 to {MAX_RECIPIENTS} addresses, separated by commas"
            raise UsageError(f"alert_email names {len(self._recipients)} recipients", remedy)
        if not all(_ADDRESS.fullmatch(address) for address in (self._sender, *self._recipients)):
            raise UsageError(
                "an address of mail is not one", "check RENDER_PLATFORM_ALERT_EMAIL and RENDER_PLATFORM_ALERT_FROM"
            )
        host = str(target.hostname)
        try:
            refused = self._deliver(target, host, self._message(alert))
        except ssl.SSLCertVerificationError:
            raise _untrusted(host) from None
        except TimeoutError:
            raise Unavailable(f"{host} did not answer within {self._timeout_s:g} s", "check that it is up") from None
        except smtplib.SMTPNotSupportedError:
            remedy = "use smtps://, or a server that offers STARTTLS, and AUTH where a login is set"
            raise Unavailable(f"{host} offers no STARTTLS, or no login", remedy) from None
        except smtplib.SMTPResponseException as error:  # its text is the server's, and may repeat the login
            raise Unavailable(f"{host} refused with {error.smtp_code}", "check RENDER_PLATFORM_SMTP_URL") from None
        except smtplib.SMTPRecipientsRefused:
            raise Unavailable(f"{host} refused every recipient", "check RENDER_PLATFORM_ALERT_EMAIL") from None
        except (smtplib.SMTPException, OSError, ValueError) as error:
            raise Unavailable(f"{host} took no mail ({type(error).__name__})", "check that it is up") from None
        return f"{host} took it for {len(self._recipients) - refused} of {len(self._recipients)} recipients"

    def _deliver(self, target: SplitResult, host: str, message: EmailMessage) -> int:
        """How many recipients were refused, where not all were."""
        context = self._tls or ssl.create_default_context()
        smtp: smtplib.SMTP
        if target.scheme == "smtps":
            smtp = _SmtpTls(host, target.port or 465, socket.gethostname(), self._timeout_s, context=context)
        else:
            port = target.port or (25 if host in self._plain else 587)
            smtp = _Smtp(host, port, socket.gethostname(), self._timeout_s)
        try:
            if target.scheme == "smtp" and host not in self._plain:
                smtp.starttls(context=context)
            if target.username:
                smtp.login(unquote(target.username), unquote(target.password or ""))
            refused = smtp.send_message(message)
            with suppress(smtplib.SMTPException, OSError):  # it has taken the message: this changes nothing
                smtp.quit()
            return len(refused)
        finally:
            smtp.close()

    def _message(self, alert: Alert) -> EmailMessage:
        message = EmailMessage(policy=policy.SMTP)
        message["From"], message["To"] = self._sender, ", ".join(self._recipients)
        message["Subject"] = f"[render-platform] {alert.headline}"
        message["Date"] = format_datetime(datetime.fromtimestamp(alert.at_us // US_PER_SECOND, UTC))
        message["Message-ID"] = f"<{alert.alert_id}@render-platform>"
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(f"{_cut(alert.text, MAX_TEXT)}\n\n{alert.link}\n")
        return message


class _Smtp(smtplib.SMTP):
    """All replies of a server together take `timeout_s` at most: smtplib's own time-out is each read's."""

    def __init__(self, host: str, port: int, own_name: str, timeout_s: float, **options: Any) -> None:
        self._ends = time.monotonic() + timeout_s
        super().__init__(host, port, own_name, timeout=timeout_s, **options)

    def getreply(self) -> tuple[int, bytes]:
        cutter = threading.Timer(max(0.0, self._ends - time.monotonic()), self._hang_up)
        cutter.start()
        try:
            return super().getreply()
        except (smtplib.SMTPServerDisconnected, OSError):
            if time.monotonic() >= self._ends:
                raise TimeoutError from None
            raise
        finally:
            cutter.cancel()

    def _hang_up(self) -> None:
        """From another thread: the read that waits ends. TLS's own farewell would wait as well, so it is left out."""
        if self.sock is not None:
            with suppress(OSError):
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


class _SmtpTls(_Smtp, smtplib.SMTP_SSL):
    pass


def _split(setting: str, url: str, schemes: tuple[str, str]) -> SplitResult:
    """The URL's parts; UsageError, which shows nothing of it, where it is none."""
    try:
        parts = urlsplit(url)
        if parts.scheme in schemes and parts.hostname and (parts.port is None or parts.port):
            return parts
    except ValueError:  # brackets or a port that are none
        pass
    raise UsageError(f"{setting} is not a URL", f"set it to {schemes[0]}://host:port or {schemes[1]}://host:port")


def _untrusted(host: str) -> Unavailable:
    return Unavailable(f"the certificate of {host} is not trusted", "install its authority on this machine")


def _escape(text: str) -> str:
    """As Slack wants it in markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
