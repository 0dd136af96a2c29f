"""What the bridge reads out of a request, and what it answers: no engine here."""

from __future__ import annotations

import base64
import gzip
import json
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlencode

import lz4.frame  # type: ignore[import-untyped]
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st
from urllib3.filepost import encode_multipart_formdata

from render_platform.bridge_protocol import (
    LIMITS,
    MAX_BODY_BYTES,
    MAX_STATEMENT_BYTES,
    Headers,
    Refused,
    Request,
    failure,
    password,
    read_request,
    success,
)

COMPRESS: dict[bytes, Callable[[bytes], bytes]] = {
    b"gzip": gzip.compress,
    b"lz4": lz4.frame.compress,
    b"zstd": zstd.compress,
}


def post(body: bytes = b"", headers: Headers | None = None, **fields: str) -> Request:
    return read_request("POST", urlencode(fields).encode(), headers or {}, body)


def refused(body: bytes = b"SELECT 1", headers: Headers | None = None, **fields: str) -> tuple[int, int, str]:
    with pytest.raises(Refused) as caught:
        post(body, headers, **fields)
    return caught.value.status, caught.value.code, str(caught.value)


def rows_of(request: Request) -> bytes | None:
    return None if request.rows is None else bytes(request.rows)


def test_a_statement_comes_from_the_body_or_the_url() -> None:
    for request in (post(b"SELECT 1"), post(query="SELECT 1")):
        assert (request.statement.strip(), request.rows, request.format) == (b"SELECT 1", None, "TabSeparated")
    assert post(b"SELECT 1", default_format="Native").format == "Native"
    assert post(b"1", query="SELECT 1 +").statement == b"SELECT 1 +\n1"
    assert refused(b" \n")[:2] == (400, 62)


INSERTS = {
    b"INSERT INTO t FORMAT CSV\n": (b"INSERT INTO t ", "CSV"),
    b"insert into `a`.`b` (`x`, `y`) format Native\n": (b"insert into `a`.`b` (`x`, `y`) ", "Native"),
    b'INSERT INTO "a FORMAT b"FORMAT CSV\r\n': (b'INSERT INTO "a FORMAT b"', "CSV"),
    b"/* it's */ -- FORMAT a\n# b'\nINSERT INTO t FORMAT CSV;\n": (
        b"/* it's */ -- FORMAT a\n# b'\nINSERT INTO t ",
        "CSV",
    ),
    b"INSERT INTO t (a) SETTINGS s='it\\'s FORMAT x' FORMAT CSV\n": (
        b"INSERT INTO t (a) SETTINGS s='it\\'s FORMAT x' ",
        "CSV",
    ),
}


@pytest.mark.parametrize("text", INSERTS, ids=lambda text: text.decode())
@given(rows=st.binary())
def test_rows_are_what_stands_behind_the_format(text: bytes, rows: bytes) -> None:
    """Whatever they are: a blank line or SQL in them must not reach the engine as a statement."""
    rows = b"\n\n; DROP TABLE t; SELECT '" + rows
    statement, rows_format = INSERTS[text]
    in_body = post(text + rows)
    assert (in_body.statement, in_body.format, rows_of(in_body)) == (statement, rows_format, rows)
    in_url = post(rows, query=text.decode())
    assert (in_url.statement, in_url.format, rows_of(in_url)) == (statement, rows_format, rows)


def test_an_insert_without_a_format_brings_no_rows() -> None:
    for text in (b"INSERT INTO t VALUES (1, 'FORMAT CSV; x')", b"INSERT INTO t SELECT formatRow('CSV', 1)"):
        assert (post(text).statement, post(text).rows) == (text, None)


@pytest.mark.parametrize(
    "text", ["SELECT 1; SELECT 2", "SELECT 1;;DROP TABLE t", "SELECT 'a", "SELECT `a", "SELECT /*"]
)
def test_a_request_is_one_whole_statement(text: str) -> None:
    assert refused(text.encode())[:2] == (400, 62)


@pytest.mark.parametrize(
    "text", ["SELECT ';'; ", "SELECT `;` -- ;\n", "SELECT 1 /* ; */;", 'SELECT "\\";", 1 # ;', "SELECT 1/2"]
)
def test_a_semicolon_may_stand_in_quotes_in_a_comment_and_at_the_end(text: str) -> None:
    assert post(text.encode()).statement == text.encode()


@pytest.mark.parametrize("piece", [b"/*", b"'", b"\\", b"/ ", b"-", b"FORMAT ", b" FORMAT a", b"x", b" ", b"`a", b"''"])
@pytest.mark.parametrize("start", [b"", b"SELECT ", b"INSERT ", b"INSERT '"])
def test_no_text_takes_long(start: bytes, piece: bytes) -> None:
    text = (start + piece * MAX_STATEMENT_BYTES)[:MAX_STATEMENT_BYTES]
    began = time.perf_counter()
    with suppress(Refused):
        post(text)
    assert time.perf_counter() - began < 5  # quadratic would be hours


def test_a_statement_is_bounded_and_rows_are_not_part_of_it() -> None:
    long = b"SELECT '" + b"x" * MAX_STATEMENT_BYTES + b"'"
    assert refused(long)[:2] == (413, 229)
    assert rows_of(post(b"INSERT INTO t FORMAT CSV\n" + long)) == long


def test_parameters_and_settings_are_told_apart() -> None:
    request = post(
        b"SELECT {x:String}",
        param_x="it's\n",
        param_y="",
        max_threads="2",
        database="d`b",
        query_id="a-1",
        buffer_size="9",
    )
    assert request.parameters == {"x": "it's\n", "y": ""}
    assert (request.database, request.query_id) == ("d`b", "a-1")
    assert set(request.settings) == {"max_threads", "readonly", *LIMITS}
    assert request.settings["max_threads"] == "2"


def test_limits_can_be_lowered_and_not_raised() -> None:
    for asked, found in (("5", "5"), ("0", "60"), ("60", "60"), ("61", "60")):
        assert post(b"SELECT 1", max_execution_time=asked).settings["max_execution_time"] == found
    for bad in ("-1", "1.5", "", "1e3", "9" * 5_000, "٣"):
        assert refused(max_execution_time=bad)[:2] == (400, 72)


def test_get_only_reads_and_readonly_is_set_last() -> None:
    for method, asked, found in (("GET", "0", "2"), ("GET", "1", "1"), ("POST", "0", "0"), ("POST", "2", "2")):
        settings = read_request(method, f"readonly={asked}&max_threads=1".encode(), {}, b"SELECT 1").settings
        assert list(settings.items())[-1] == ("readonly", found)


def test_what_is_not_supported_is_refused_in_words() -> None:
    status, code, text = refused(session_id="a")
    assert (status, code) == (501, 48)
    assert "autogenerate_session_id=False" in text
    for name in ("role", "quota_key", "password", "compress", "decompress"):
        status, code, text = refused(b"SELECT 1", None, **{name: "1"})
        assert (status, code) == (501, 48)
        assert name in text
    assert post(b"SELECT 1", compress="0").settings.get("compress") is None
    assert refused(b"SELECT 1", None, **{"a = 1, b": "1"})[:2] == (404, 115)
    assert refused(query_id="a\r\nb: c")[:2] == (400, 36)


@given(st.dictionaries(st.from_regex(r"param_[a-z]{1,9}", fullmatch=True), st.text(st.characters(codec="utf-8"))))
def test_a_form_holds_what_is_too_long_for_the_url(parameters: dict[str, str]) -> None:
    body, content_type = encode_multipart_formdata({"query": "SELECT 1\n", **parameters})
    request = post(body, {b"content-type": content_type.encode()})
    assert request.statement.strip() == b"SELECT 1"
    assert request.parameters == {name.removeprefix("param_"): text for name, text in parameters.items()}
    assert refused(body[:-9], {b"content-type": content_type.encode()})[0] == 400


def test_a_form_with_a_file_is_external_data() -> None:
    body, content_type = encode_multipart_formdata({"query": "SELECT 1", "t": ("name", b"1\n", "text/csv")})
    status, code, text = refused(body, {b"content-type": content_type.encode()})
    assert (status, code) == (501, 48)
    assert "external data" in text


@pytest.mark.parametrize("encoding", COMPRESS)
@given(data=st.binary(max_size=200), cut=st.integers(1, 8))
def test_compressed_bodies(encoding: bytes, data: bytes, cut: int) -> None:
    body = COMPRESS[encoding](b"INSERT INTO t FORMAT CSV\n")
    body += COMPRESS[encoding](data)  # a client compresses each block by itself
    assert rows_of(post(body, {b"content-encoding": encoding})) == data
    assert refused(body[:-cut], {b"content-encoding": encoding})[:2] == (400, 271)
    assert refused(data + b"no", {b"content-encoding": encoding})[:2] == (400, 271)
    assert refused(data, {b"content-encoding": b"br"})[:2] == (501, 48)


def test_a_body_that_grows_without_end_is_refused() -> None:
    bomb = zstd.compress(b"INSERT INTO t FORMAT CSV\n") + zstd.compress(bytes(MAX_BODY_BYTES)) * 4
    tracemalloc.start()
    try:
        assert refused(bomb, {b"content-encoding": b"zstd"})[:2] == (413, 307)
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_BODY_BYTES
    finally:
        tracemalloc.stop()


@given(
    st.binary(max_size=50) | st.text(alphabet="param_x=&%fF;+", max_size=50).map(str.encode),
    st.binary(max_size=200),
    st.dictionaries(
        st.sampled_from([b"content-type", b"content-encoding", b"accept-encoding", b"authorization"]),
        st.binary(max_size=30) | st.sampled_from([b"multipart/form-data; boundary=b", b"gzip", b"Basic !"]),
    ),
)
def test_garbage_is_refused_or_read(url_query: bytes, body: bytes, headers: dict[bytes, bytes]) -> None:
    password(headers)
    with suppress(Refused):
        read_request("POST", url_query, headers, body)


def test_the_password_comes_in_either_header() -> None:
    basic = {b"authorization": b"Basic " + base64.b64encode(b"bridge:to:ken")}
    assert password(basic) == b"to:ken"
    assert password(basic | {b"x-clickhouse-key": b"other"}) == b"other"
    for text in (b"", b"Basic", b"Basic \xff", b"Bearer dG9rZW4="):
        assert password({b"authorization": text}) == b""


@pytest.mark.parametrize(
    ("text", "status", "code"),
    [
        ("Code: 60. DB::Exception: no table. (UNKNOWN_TABLE)", 404, "60"),
        ("Streaming insert finish failed: Code: 27. DB::Exception: no comma", 400, "27"),
        ("Code: 159. DB::Exception: Timeout", 408, "159"),
        ("Code: 164. DB::Exception: readonly", 500, "164"),
        ("something else", 500, "1001"),
    ],
)
def test_errors_have_the_engine_s_code(text: str, status: int, code: str) -> None:
    answer = failure(text)
    assert (answer.status, answer.headers["x-clickhouse-exception-code"]) == (status, code)
    assert answer.body.decode() == text[max(text.find("Code"), 0) :] + "\n"


def test_an_answer_says_what_it_is() -> None:
    answer = success(post(b"SELECT 1 FORMAT CSV", query_id="q"), b"1\n", "UTC", {"written_rows": 3})
    assert (answer.status, answer.body) == (200, b"1\n")
    assert json.loads(answer.headers["x-clickhouse-summary"]) == {"written_rows": "3"}
    assert answer.headers["x-clickhouse-query-id"] == "q"
    for text, found in (("SELECT 1 FORMAT CSV;", "CSV"), ("(select 1)", "TabSeparated"), ("DROP TABLE t", None)):
        assert success(post(text.encode()), b"", "UTC", {}).headers.get("x-clickhouse-format") == found


@pytest.mark.parametrize("encoding", COMPRESS)
def test_an_answer_is_compressed_where_it_was_asked(encoding: bytes) -> None:
    opened = {b"gzip": gzip.decompress, b"lz4": lz4.frame.decompress, b"zstd": zstd.decompress}[encoding]
    accepted = {b"accept-encoding": b"br, " + encoding.upper()}
    answer = success(post(b"SELECT 1", accepted, enable_http_compression="1"), b"1\n" * 99, "UTC", {})
    assert answer.headers["content-encoding"].encode() == encoding
    assert opened(answer.body) == b"1\n" * 99
    for request in (post(b"SELECT 1", accepted), post(b"SELECT 1", enable_http_compression="1")):
        assert success(request, b"1", "UTC", {}).body == b"1"
