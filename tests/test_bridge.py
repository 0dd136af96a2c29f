"""The bridge as a process: who may use it, and what clickhouse-connect can do through it."""

from __future__ import annotations

import asyncio
import http.client
import stat
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import clickhouse_connect
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pytest
from clickhouse_connect.driver.exceptions import DatabaseError
from clickhouse_connect.driver.external import ExternalData

from render_platform.bridge import NAME
from render_platform.clickhouse_connection import FolderLock
from tests import chdb_server
from tests.chdb_server import BridgeProcess, bridge_over, open_raw

Answered = tuple[int, bytes, dict[str, str]]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BridgeProcess]:
    with bridge_over(tmp_path_factory.mktemp("bridge") / "clickhouse") as running:
        yield running


@pytest.fixture
def client(bridge: BridgeProcess) -> Iterator[Any]:
    """clickhouse-connect on a database of the test's own, with a table of a few types."""
    name = chdb_server.fresh_database()
    with closing(open_raw(bridge.dsn)) as first:
        first.command(f"CREATE DATABASE {name}")
    with closing(open_raw(bridge.dsn, name)) as opened:
        opened.command("CREATE TABLE t (n Int64, text String, at DateTime('UTC')) ENGINE = MergeTree ORDER BY n")
        yield opened


def ask(
    bridge: BridgeProcess, body: bytes | str = b"", method: str = "POST", path: str = "/", **headers: str
) -> Answered:
    """One request, with the token unless `headers` bring another; names have _ where HTTP has -."""
    parts = urlsplit(bridge.dsn)
    token = {"authorization": "Basic " + b64encode(f"{parts.username}:{parts.password}".encode()).decode()}
    sent = token | {name.replace("_", "-"): text for name, text in headers.items()}
    with closing(http.client.HTTPConnection("127.0.0.1", parts.port or 0, timeout=60)) as connection:
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        return response.status, response.read(), {name.lower(): text for name, text in response.getheaders()}


ROWS = [[1, "a", 0], [2, "it's;\n\n", 1_700_000_000], [3, "ü\0\t\\", 1]]


def rows(client: Any) -> list[list[Any]]:
    found = client.query("SELECT n, text, toUnixTimestamp(at) FROM t ORDER BY n").result_rows
    return [list(row) for row in found]


def test_it_says_what_it_is(bridge: BridgeProcess) -> None:
    status, body, headers = ask(bridge, method="GET", path="/ping", authorization="")
    assert (status, body, headers["server"]) == (200, b"Ok.\n", NAME)
    assert headers["x-clickhouse-server-display-name"] == NAME


def test_only_the_url_file_has_the_token(bridge: BridgeProcess) -> None:
    file = FolderLock.url_file(bridge.folder)
    token = urlsplit(file.read_text()).password or ""
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file == bridge.folder.parent / "clickhouse.url"
    assert len(token) > 40
    assert token not in bridge.url
    assert token not in Path(f"/proc/{bridge.pid}/cmdline").read_text()


@pytest.mark.parametrize(
    "headers", [{"authorization": ""}, {"x_clickhouse_key": "no"}, {"authorization": "Basic YTpi"}]
)
def test_without_the_token_nothing_is_answered(bridge: BridgeProcess, headers: dict[str, str]) -> None:
    status, body, found = ask(bridge, "SELECT 1", **headers)
    assert (status, found["x-clickhouse-exception-code"]) == (403, "516")
    assert b"1\n" not in body


def test_the_token_may_come_as_a_key(bridge: BridgeProcess) -> None:
    token = urlsplit(bridge.dsn).password or ""
    assert ask(bridge, "SELECT 1", authorization="", x_clickhouse_key=token)[:2] == (200, b"1\n")


def test_a_page_that_calls_loopback_by_another_name_is_refused(bridge: BridgeProcess) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:127.0.0.1", ""):
        assert ask(bridge, "SELECT 1", host=host)[0] in (400, 403)
    assert ask(bridge, "SELECT 1", host="localhost:1")[0] == 200


def test_nothing_else_listens(bridge: BridgeProcess) -> None:
    port = f"{urlsplit(bridge.url).port:04X}"
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    assert [address for address in listening if address.endswith(f":{port}")] == [f"0100007F:{port}"]


def test_other_methods_and_paths_are_refused(bridge: BridgeProcess) -> None:
    for method in ("PUT", "DELETE", "OPTIONS"):
        assert ask(bridge, "SELECT 1", method=method)[0] == 405
    assert ask(bridge, "SELECT 1", path="/play")[0] == 404


def test_get_only_reads(bridge: BridgeProcess, client: Any) -> None:
    path = "/?" + urlencode({"query": "SELECT 1"})
    assert ask(bridge, method="GET", path=path)[:2] == (200, b"1\n")
    for statement in ("CREATE DATABASE made_by_get", "SET readonly = 0", "DROP DATABASE default"):
        status, body, headers = ask(bridge, method="GET", path="/?" + urlencode({"query": statement}))
        assert (status, headers["x-clickhouse-exception-code"]) == (500, "164")
        assert b"READONLY" in body


@pytest.mark.parametrize("compress", [False, "lz4", "zstd", "gzip"])
def test_rows_go_in_and_come_back(bridge: BridgeProcess, client: Any, compress: bool | str) -> None:
    with closing(open_raw(bridge.dsn, client.database, compress=compress)) as other:
        data = [[row[0], row[1], pd.Timestamp(row[2], unit="s")] for row in ROWS]
        assert other.insert("t", data, column_names=["n", "text", "at"]).written_rows == 3
        assert rows(other) == ROWS
        assert other.query("SELECT * FROM t WHERE n = {n:Int64}", parameters={"n": 2}).result_rows[0][1] == ROWS[1][1]


def test_frames_and_tables_go_in_and_come_back(client: Any) -> None:
    frame = pd.DataFrame(ROWS, columns=["n", "text", "at"]).assign(at=lambda f: pd.to_datetime(f["at"], unit="s"))
    client.insert_df("t", frame)
    table = pa.table({"n": [4], "text": ["arrow\n\n"], "at": pa.array([4], pa.timestamp("s"))})
    client.insert_arrow("t", table)
    assert rows(client) == [*ROWS, [4, "arrow\n\n", 4]]
    assert client.query_df("SELECT n FROM t ORDER BY n")["n"].to_list() == [1, 2, 3, 4]
    assert client.query_arrow("SELECT n FROM t ORDER BY n").column("n").to_pylist() == [1, 2, 3, 4]
    with client.query_row_block_stream("SELECT n FROM t ORDER BY n") as stream:
        assert [row[0] for block in stream for row in block] == [1, 2, 3, 4]


@pytest.mark.parametrize("compress", [False, "lz4", "gzip"])
def test_large_answers_come_in_streams(bridge: BridgeProcess, client: Any, compress: bool | str) -> None:
    count = 300_000
    with closing(open_raw(bridge.dsn, client.database, compress=compress)) as other:
        other.insert_arrow("t", pa.table({"n": range(count), "text": ["it's;\n"] * count}))
        query, some = "SELECT n, text FROM t WHERE n < {below:Int64} ORDER BY n", {"below": count - 1}
        settings = {"max_block_size": 50_000}
        with other.query_arrow_stream(query, some, settings) as stream:
            batches = list(stream)
        assert len(batches) > 1
        assert [n for batch in batches for n in batch.column("n").to_pylist()] == list(range(count - 1))
        with other.query_df_stream(query, some, settings) as frames:
            assert sum(len(frame) for frame in frames) == count - 1
        with other.query_rows_stream(query, some, settings) as found:
            assert sum(n for n, _ in found) == sum(range(count - 1))
        with (
            pytest.raises(DatabaseError, match="UNKNOWN_TABLE"),
            other.query_arrow_stream("SELECT * FROM nope") as nothing,
        ):
            list(nothing)


FORMATS = {
    "JSONEachRow": b'{"n":1,"text":"a;"}\n\n\n{"n":2,"text":"; DROP TABLE t"}\n',
    "CSV": b'1,"a;"\n2,"; DROP TABLE t"\n',
    "TSV": b"1\ta;\n2\t; DROP TABLE t\n",
    "RowBinary": b"".join(
        n.to_bytes(8, "little") + bytes([len(t)]) + t for n, t in ((1, b"a;"), (2, b"; DROP TABLE t"))
    ),
    "Values": b"(1, 'a;')\n\n,(2,'; DROP TABLE t')",
}


@pytest.mark.parametrize("rows_format", FORMATS)
def test_rows_in_other_formats(client: Any, rows_format: str) -> None:
    summary = client.raw_insert("t", ["n", "text"], FORMATS[rows_format], fmt=rows_format)
    assert summary.written_rows == 2
    assert client.query("SELECT n, text FROM t ORDER BY n").result_rows == [(1, "a;"), (2, "; DROP TABLE t")]


def test_many_rows_arrive_in_pieces(client: Any) -> None:
    count = 400_000
    table = pa.table({"n": range(count), "text": ["some text;\n\n"] * count})
    client.insert_arrow("t", table)
    client.raw_insert("t", ["n", "text"], b"1,x\n" * count, fmt="CSV")
    assert client.query("SELECT count(), sum(length(text)) FROM t").first_row == (2 * count, 13 * count)
    assert client.query_arrow("SELECT * FROM t").num_rows == 2 * count


def test_long_parameters_go_by_form(client: Any) -> None:
    many = [f"it's {number};\n" for number in range(2_000)]
    found = client.query("SELECT length({many:Array(String)}), {many:Array(String)}[7]", parameters={"many": many})
    assert found.first_row == (2_000, many[6])


def test_settings_take_effect_and_are_gone_with_the_request(client: Any) -> None:
    query = "SELECT getSetting('max_threads'), getSetting('max_execution_time')"
    assert client.query(query, settings={"max_threads": 3, "max_execution_time": 7}).first_row == (3, 7)
    assert client.query(query, settings={"max_execution_time": 7_000}).first_row[1] == 60
    assert client.query(query).first_row[0] != 3
    client.command("ALTER TABLE t MODIFY SETTING non_replicated_deduplication_window = 100")
    for token in ("a", "a", "it's b"):
        client.raw_insert("t", ["n"], b"1\n", fmt="CSV", settings={"insert_deduplication_token": token})
    assert client.command("SELECT count() FROM t") == 2


def test_an_error_has_the_engine_s_code_and_text(bridge: BridgeProcess, client: Any) -> None:
    for statement, code, name in (
        ("SELECT * FROM nope", 60, "UNKNOWN_TABLE"),
        ("SELECT {x:Int8}", 456, None),
        ("x", 62, None),
    ):
        with pytest.raises(DatabaseError) as caught:
            client.query(statement)
        assert caught.value.code == code
        assert name in (None, caught.value.name)
    with (
        closing(clickhouse_connect.get_client(dsn=bridge.dsn, session_id="a")) as in_session,
        pytest.raises(DatabaseError, match="no sessions"),
    ):
        in_session.command("SELECT 1")
    with pytest.raises(DatabaseError, match="external data"):
        client.query(
            "SELECT * FROM e", external_data=ExternalData(file_name="e", data=b"1\n", fmt="CSV", structure="n Int8")
        )
    with pytest.raises(DatabaseError, match="UNKNOWN_DATABASE"):
        client.command("SELECT 1", settings={"database": "no`pe"})


def test_commands_tell_an_empty_answer_from_none(client: Any) -> None:
    assert client.command("SELECT 'x' WHERE 0") == ""
    assert client.command("TRUNCATE TABLE t").written_rows == 0
    assert client.command("SELECT 'a', 'b'") == ["a", "b"]


def test_the_async_client(bridge: BridgeProcess, client: Any) -> None:
    async def run() -> object:
        options = {"dsn": bridge.dsn, "database": client.database, "autogenerate_session_id": False}
        other = await clickhouse_connect.get_async_client(**options)
        try:
            await asyncio.gather(*(other.raw_insert("t", ["n"], b"%d\n" % n, fmt="CSV") for n in range(5)))
            return await other.command("SELECT sum(n) FROM t")
        finally:
            await other.close()

    assert asyncio.run(run()) == 10


def test_a_failed_answer_leaves_nothing_to_the_next(client: Any) -> None:
    client.command("INSERT INTO t (n, text) SELECT number, 'text' FROM numbers(100000)")
    for _ in range(8):
        with pytest.raises(DatabaseError):
            client.query_arrow("SELECT n, throwIf(n = 90000) FROM t ORDER BY n SETTINGS max_block_size = 1000")
        assert client.query_arrow("SELECT 1 AS x").to_pylist() == [{"x": 1}]
