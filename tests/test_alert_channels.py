"""The channels of alerts: what each sends, how each fails, that no secret is given away; and `alert test`."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from render_platform.cli import main
from render_platform.config import load_settings
from render_platform.errors import PlatformError, Unavailable, UsageError
from render_platform.operations.alert_channels import (
    Alert,
    Channel,
    EmailChannel,
    HttpChannel,
    open_channels,
    slack_document,
    webhook_document,
)
from tests.commands import restored_process
from tests.factories import START_US
from tests.receivers import MailServer, Receiver, SlowServer, certificate, free_port

SECRET = "T0KEN5ecretPath"
ALERT = Alert("k/1", "error", "one <b> is & wrong", "see <!channel> & act", "http://ui/runs/1?a=1&b=2", START_US)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as opened:
        yield opened


def webhook(url: str, **options: Any) -> HttpChannel:
    return HttpChannel("webhook", f"{url}/{SECRET}", webhook_document, **options)


def email(port: int, login: str = "", scheme: str = "smtp", **options: Any) -> EmailChannel:
    return EmailChannel(f"{scheme}://{login}127.0.0.1:{port}", "", ["ops@example.com"], **options)


def refused(channel: Channel, alert: Alert = ALERT) -> str:
    """Why a channel did not take an alert; it holds no secret, nor does what would be shown of it as a traceback."""
    with pytest.raises(PlatformError) as raised:
        channel.send(alert)
    shown = "".join(traceback.format_exception(raised.value)) + repr(raised.value) + repr(channel)
    assert SECRET not in shown
    assert isinstance(raised.value, Unavailable | UsageError)
    assert raised.value.remedy
    return str(raised.value)


# Web receivers.


def test_the_webhook_gets_our_document(receiver: Receiver) -> None:
    said = webhook(receiver.url).send(ALERT)
    (request,) = receiver.requests
    assert request.path == f"/{SECRET}"
    assert request.headers["Content-Type"] == "application/json"
    assert request.document == {
        "version": 1,
        "type": "alert",
        "id": ALERT.alert_id,
        "key": "k/1",
        "severity": "error",
        "title": "one <b> is & wrong",
        "text": "see <!channel> & act",
        "link": "http://ui/runs/1?a=1&b=2",
        "at": "2023-11-16T18:00:00Z",
    }
    assert said == "127.0.0.1 answered 200"


def test_slack_gets_blocks_and_a_text_that_mentions_nobody(receiver: Receiver) -> None:
    HttpChannel("slack", receiver.url, slack_document).send(ALERT)
    (document,) = receiver.documents
    assert document["text"] == (
        "Error: one &lt;b&gt; is &amp; wrong\nsee &lt;!channel&gt; &amp; act\nhttp://ui/runs/1?a=1&amp;b=2"
    )
    header, section, context = document["blocks"]
    assert header == {"type": "header", "text": {"type": "plain_text", "text": "Error: one <b> is & wrong"}}
    assert section == {"type": "section", "text": {"type": "plain_text", "text": "see <!channel> & act"}}
    (element,) = context["elements"]
    assert (context["type"], element["type"]) == ("context", "mrkdwn")
    assert element["text"] == "<http://ui/runs/1?a=1&amp;b=2|Open in Dagster> · 2023-11-16T18:00:00Z"


@given(st.text(max_size=5_000), st.text(max_size=5_000))
def test_slack_s_limits_are_kept_whatever_is_said(title: str, text: str) -> None:
    header, section, _ = slack_document(replace(ALERT, title=title, text=text))["blocks"]
    assert 1 <= len(header["text"]["text"]) <= 150
    assert 1 <= len(section["text"]["text"]) <= 3_000
    assert "\n" not in header["text"]["text"]


@pytest.mark.parametrize(
    ("status", "said"),
    [(302, "answered 302, a redirect"), (404, "answered 404 (check"), (500, "answered 500"), (429, "it is sent again")],
)
def test_an_answer_that_is_not_good_is_a_failure_and_no_redirect_is_followed(status: int, said: str) -> None:
    with Receiver() as elsewhere, Receiver([status], headers=[f"Location: {elsewhere.url}/stolen"]) as receiver:
        assert said in refused(webhook(receiver.url))
        assert len(receiver.requests) == 1
        assert elsewhere.requests == []


def test_receivers_that_say_nothing_or_are_not_there() -> None:
    with SlowServer(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000) as slow:
        assert "did not answer within 0.5 s" in refused(webhook(f"http://127.0.0.1:{slow.port}", timeout_s=0.5))
    assert "gave no answer" in refused(webhook(f"http://127.0.0.1:{free_port()}"))
    assert "is not a URL" in refused(webhook("ftp://127.0.0.1"))
    assert "is not a URL" in refused(webhook(f"http://[{SECRET}"))


def test_a_certificate_is_checked(tmp_path: Path) -> None:
    tls = certificate(tmp_path)
    with Receiver(tls=tls) as receiver:
        assert "the certificate of 127.0.0.1 is not trusted" in refused(webhook(receiver.url))
        assert receiver.requests == []
        assert webhook(receiver.url, tls=tls.client).send(ALERT)
    with MailServer(tls, implicit=True) as server:
        assert "certificate of 127.0.0.1 is not trusted" in refused(email(server.port, scheme="smtps"))
    with MailServer(tls) as server:
        assert "certificate of 127.0.0.1 is not trusted" in refused(email(server.port, plain=frozenset()))


# E-mail.


def test_mail_goes_plainly_to_this_machine() -> None:
    with MailServer() as server:
        channel = EmailChannel(f"smtp://127.0.0.1:{server.port}", "platform@example.com", ["a@x.org", "b@x.org"])
        assert channel.send(replace(ALERT, title="two\nlines, ünïcode")) == "127.0.0.1 took it for 2 of 2 recipients"
        mail = server.mails.get(timeout=5)
    assert (mail.sender, mail.recipients) == ("platform@example.com", ["a@x.org", "b@x.org"])
    assert (mail.tls, mail.login) == (False, None)
    assert mail.message["Subject"] == "[render-platform] Error: two lines, ünïcode"
    assert mail.message["Message-ID"] == f"<{ALERT.alert_id}@render-platform>"
    assert mail.message["Auto-Submitted"] == "auto-generated"
    assert mail.message["Date"] == "Thu, 16 Nov 2023 18:00:00 +0000"
    assert mail.message.get_content().split() == [*ALERT.text.split(), ALERT.link]


@pytest.mark.filterwarnings("ignore:Requiring AUTH")
@pytest.mark.parametrize("implicit", [False, True])
def test_mail_goes_by_tls_with_the_login(tmp_path: Path, implicit: bool) -> None:
    tls = certificate(tmp_path)
    scheme = "smtps" if implicit else "smtp"
    with MailServer(tls, implicit=implicit, login=("ops@x", f"{SECRET}/1")) as server:
        given: dict[str, Any] = {"scheme": scheme, "tls": tls.client, "plain": frozenset[str]()}
        email(server.port, f"ops%40x:{SECRET}%2F1@", **given).send(ALERT)
        mail = server.mails.get(timeout=5)
        assert (mail.tls, mail.login, mail.sender) == (True, "ops@x", "ops@example.com")
        assert "refused with 535" in refused(email(server.port, f"ops%40x:{SECRET}@", **given))
        assert server.mails.empty()


def test_tls_is_never_given_up() -> None:
    with MailServer() as server:
        assert "no STARTTLS" in refused(email(server.port, f"me:{SECRET}@", plain=frozenset()))
        assert server.mails.empty()


def test_recipients_that_are_refused() -> None:
    with MailServer(refuse="@gone.org") as server:
        url = f"smtp://127.0.0.1:{server.port}"
        assert "took it for 1 of 2" in EmailChannel(url, "", ["a@x.org", "b@gone.org"]).send(ALERT)
        assert server.mails.get(timeout=5).recipients == ["a@x.org"]
        assert "refused every recipient" in refused(EmailChannel(url, "", ["b@gone.org"]))


def test_mail_servers_that_do_not_work() -> None:
    for text in (b"220-" + b"x" * 10_000, b"220 hello\r\n250-" + b"x" * 10_000):
        with SlowServer(text) as slow:
            assert "did not answer within 1 s" in refused(email(slow.port, f"me:{SECRET}@", timeout_s=1))
    assert "took no mail (ConnectionRefusedError)" in refused(email(free_port(), f"me:{SECRET}@"))
    for url in ("", f"http://{SECRET}", f"smtp://me:{SECRET}@host:nonsense"):
        assert "SMTP_URL is not a URL" in refused(EmailChannel(url, "", ["a@x.org"]))
    for recipients in ([], ["nobody"], ["a@x.org\r\nBcc: b@x.org"], [f"a{n}@x.org" for n in range(21)]):
        assert "ALERT_EMAIL" in refused(EmailChannel("smtp://127.0.0.1:9", "", recipients))


# The command.


def run_test(*options: str, **env: str) -> Any:
    with restored_process():
        named = {f"RENDER_PLATFORM_{name}": value for name, value in env.items()}
        result = CliRunner(env=named).invoke(main, ["alert", "test", *options])
    assert SECRET not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def test_each_configured_channel_is_proven(receiver: Receiver) -> None:
    with Receiver() as slack, MailServer() as server:
        done = run_test(
            ALERT_WEBHOOK=f"{receiver.url}/{SECRET}",
            ALERT_SLACK=f"{slack.url}/{SECRET}",
            ALERT_EMAIL="a@x.org, b@x.org",
            SMTP_URL=f"smtp://127.0.0.1:{server.port}",
            ALERT_FROM="platform@x.org",
            DAGSTER_URL="https://dagster.example.com/",
        )
        mail = server.mails.get(timeout=5)
    assert done.exit_code == 0, done.output
    assert [line.split(":")[0].split() for line in done.stdout.splitlines()] == [
        ["webhook", "sent"],
        ["slack", "sent"],
        ["email", "sent"],
    ]
    assert receiver.documents[0]["link"] == "https://dagster.example.com/runs"
    assert "test" in slack.documents[0]["text"]
    assert (mail.sender, mail.recipients) == ("platform@x.org", ["a@x.org", "b@x.org"])


def test_one_that_fails_is_named_and_the_others_are_tried(receiver: Receiver) -> None:
    with Receiver([403]) as slack:
        urls = {"ALERT_SLACK": f"{slack.url}/{SECRET}", "ALERT_WEBHOOK": f"{receiver.url}/{SECRET}"}
        mail = {"ALERT_EMAIL": "a@x.org", "SMTP_URL": f"smtp://me:{SECRET}@127.0.0.1:{free_port()}"}
        done = run_test("--json", **urls, **mail)
    assert done.exit_code == 3
    found = {one["channel"]: one for one in json.loads(done.stdout)}
    assert {name: one["sent"] for name, one in found.items()} == {"webhook": True, "slack": False, "email": False}
    assert found["slack"]["said"] == "127.0.0.1 answered 403"
    assert "RENDER_PLATFORM_ALERT_SLACK" in found["slack"]["remedy"]
    assert "alert_not_sent" in done.stderr, "it is logged as well"


def test_without_channels_it_says_how_to_have_one() -> None:
    done = run_test()
    assert done.exit_code == 2
    assert "no alert channel is configured" in done.stderr
    assert "RENDER_PLATFORM_ALERT_WEBHOOK" in done.stderr


def test_settings_do_not_show_what_they_hold() -> None:
    url = f"https://me:{SECRET}@host/{SECRET}"
    found = load_settings({}, alert_webhook=url, alert_slack=url, smtp_url=url, alert_email="a@x.org")
    assert SECRET not in repr(found)
    assert [channel.name for channel in open_channels(found)] == ["webhook", "slack", "email"]
    for name, value in (("ALERT_REPEAT_S", "59"), ("REPAIR_AUTOMATICALLY", "2")):
        with pytest.raises(UsageError, match="set it to"):
            load_settings({f"RENDER_PLATFORM_{name}": value})
