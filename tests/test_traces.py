"""Reading traces: what is a job, what is a bad row and on which line, and what is no trace at all."""

from __future__ import annotations

import gzip
import hashlib
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from render_platform.clock import iso
from render_platform.errors import UsageError
from render_platform.trace_formats import MAX_TOKENS
from render_platform.traces import MAX_LINE_BYTES, Trace, generated_trace, read_trace

REAL = Path(__file__).parents[1].parent / "shared" / "traces"
AZURE = b"TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = b"2023-11-16 18:15:46.6805900,374,44\n"
IMAGES = (
    b"gmt_create,predict_type,predict_status,exec_time_seconds,groupId,prompt_length,"
    b"num_images_per_prompt,num_inference_steps\n"
)


def read(folder: Path, content: bytes, name: str = "trace") -> Trace:
    path = folder / name
    path.write_bytes(content)
    return read_trace(path)


def real(name: str) -> Path:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"REAL TRACE NOT TESTED: {path} is missing")
    return path


@pytest.mark.parametrize(
    ("name", "rows", "first"),
    [
        ("AzureLLMInferenceTrace_conv.csv", 19_366, "2023-11-16T18:15:46.680590Z"),
        ("AzureLLMInferenceTrace_code.csv", 8_819, "2023-11-16T18:17:03.979960Z"),
    ],
)
def test_the_real_azure_traces_are_read_whole(name: str, rows: int, first: str) -> None:
    path = real(name)
    counts: list[int] = []
    trace = read_trace(path, counts.append)
    assert trace.bad_rows == []
    assert len(trace.jobs) == rows == counts[-1]
    assert {job.row for job in trace.jobs} == set(range(1, rows + 1))
    assert iso(trace.jobs[0].arrival_us) == first
    assert trace.format.name == "azure_llm"
    assert trace.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    lines = path.read_text().splitlines()
    assert all(lines[job.line - 1].endswith(f",{job.input_tokens},{job.output_tokens}") for job in trace.jobs)


def test_the_real_servegen_trace_begins_as_its_file_does(tmp_path: Path) -> None:
    with gzip.open(real("servegen_deepseek_r1_1day_reconstructed.csv.gz"), "rb") as file:
        head = b"".join(file.readline() for _ in range(20_001))
    trace = read(tmp_path, gzip.compress(head))
    assert (trace.format.name, len(trace.jobs), trace.bad_rows) == ("servegen", 20_000, [])
    job = trace.jobs[0]
    assert (job.client, job.input_tokens, job.output_tokens) == ("23", 235, 490)
    assert iso(job.arrival_us) == "2025-01-01T00:00:00.001000Z"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"2023-11-16 18:15:46,374", "the row has 2 columns, the header has 3"),
        (b"2023-11-16 18:15:46,374,44,5", "the row has 4 columns, the header has 3"),
        (b"2023-11-16 18:15:46,many,44", "ContextTokens: 'many' is not a whole number"),
        (b"2023-11-16 18:15:46,-3,44", "ContextTokens: '-3' is not a whole number of at least 0"),
        (b"2023-11-16 18:15:46,374,44.0", "GeneratedTokens: '44.0' is not a whole number"),
        (b"2023-11-16 18:15:46,374,1e3", "GeneratedTokens: '1e3' is not a whole number"),
        (b"2023-11-16 18:15:46,374, 44", "GeneratedTokens: ' 44' is not a whole number"),
        (b"2023-11-16 18:15:46,1_0,44", "ContextTokens: '1_0' is not a whole number"),
        ("2023-11-16 18:15:46,٣,44".encode(), "ContextTokens: '٣' is not a whole number"),
        (b"2023-11-16 18:15:46,374,", "GeneratedTokens: is missing"),
        (b",374,44", "TIMESTAMP: is missing"),
        (b"2023-11-16 18:15:46,374,%d" % (MAX_TOKENS + 1), "GeneratedTokens: '10000001' is out of range"),
        (b"2023-11-16 18:15:46,374," + b"9" * 5_000, "GeneratedTokens: '9999"),
        (
            b"2023-02-30 18:15:46,374,44",
            "TIMESTAMP: '2023-02-30 18:15:46' is not a time: day is out of range",
        ),
        (b"2023-11-16 24:15:46,374,44", "TIMESTAMP: '2023-11-16 24:15:46' is not a time: hour"),
        (b"1700158546,374,44", "TIMESTAMP: '1700158546' is not a time such as"),
        (b"1823-11-16 18:15:46,374,44", "TIMESTAMP: is out of range"),
        (b"2023-11-16 18:15:46,3\x004,44", "ContextTokens: holds a NUL byte"),
        (b"2023-11-16 18:15:46,3\xff4,44", "ContextTokens: is not UTF-8"),
        (b'2023-11-16 18:15:46,"3\n4",44', "ContextTokens: '3\\n4' is not a whole number"),
        (b'2023-11-16 18:15:46,"374,44', "ContextTokens: a quote is opened and not closed"),
        (b'2023-11-16 18:15:46,"3"4"",44', "not a CSV row"),
        (b"", "the line is blank"),
        (b"   ", "the line is blank"),
        (b"2023-11-16 18:15:46,374," + b"4" * MAX_LINE_BYTES, "the line is longer than"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_the_others_are_read(tmp_path: Path, row: bytes, reason: str) -> None:
    after = 4 + row.count(b"\n")
    trace = read(tmp_path, AZURE + GOOD + row + b"\n" + GOOD)
    assert [bad.line for bad in trace.bad_rows] == [3]
    assert trace.bad_rows[0].reason.startswith(reason)
    assert [(job.row, job.line) for job in trace.jobs] == [(1, 2), (3, after)]


def test_a_stray_quote_costs_one_row_and_not_the_rest(tmp_path: Path) -> None:
    stray = b'2023-11-16 18:15:46,3"74,44\n'
    trace = read(tmp_path, AZURE + stray + GOOD * 300 + stray)
    assert [bad.line for bad in trace.bad_rows] == [2, 303]
    assert [job.line for job in trace.jobs] == list(range(3, 303))


@pytest.mark.parametrize(
    "content",
    [
        AZURE + GOOD,
        (AZURE + GOOD).rstrip(b"\n"),
        (AZURE + GOOD).replace(b"\n", b"\r\n"),
        (AZURE + GOOD).replace(b"\n", b"\r\n").removesuffix(b"\r\n"),
        b"\xef\xbb\xbf" + AZURE + GOOD,
        AZURE + GOOD + b"\n",
        AZURE + b'"2023-11-16T18:15:46.68059Z","374","44"\n',
        b"GeneratedTokens,extra,TIMESTAMP,ContextTokens\n44,\xe2\x82\xac,2023-11-16 18:15:46.6805909,374\n",
        gzip.compress(AZURE + GOOD),
        gzip.compress(AZURE) + gzip.compress(GOOD),
    ],
)
def test_the_same_job_in_every_harmless_spelling(tmp_path: Path, content: bytes) -> None:
    trace = read(tmp_path, content)
    assert trace.bad_rows == []
    (job,) = trace.jobs
    assert iso(job.arrival_us) == "2023-11-16T18:15:46.680590Z"
    assert (job.row, job.line, job.input_tokens, job.output_tokens) == (1, 2, 374, 44)


def test_jobs_are_in_order_of_arrival_then_row(tmp_path: Path) -> None:
    rows = b"500,a,1,1,0\n100,b,1,1,0\n500,c,1,1,0\n1735689600050,d,1,1,0\n"
    trace = read(tmp_path, b"timestamp_ms,client_id,input_tokens,output_tokens,reason_tokens\n" + rows)
    assert [job.client for job in trace.jobs] == ["d", "b", "a", "c"]
    assert iso(trace.jobs[0].arrival_us) == "2025-01-01T00:00:00.050000Z"


def test_an_image_log_has_its_own_run_times_and_unfinished_rows(tmp_path: Path) -> None:
    rows = (
        b"2024-11-15 16:57:50,TXT_2_IMG,SUCCEED,32.0,G0000,63.0,1.0,30.0\n"
        b"2024-11-15 16:57:51,TXT_2_IMG,FAILED,3.1234567,G0001,63.0,,\n"
        b"2024-11-15 16:57:52,TXT_2_IMG,PENDING,,G0001,63.0,8.0,30.0\n"
        b"2024-11-15 16:57:53,TXT_2_IMG,LOST,1.0,G0001,63.0,8.0,30.0\n"
        b"2024-11-15 16:57:54,TXT_2_IMG,SUCCEED,nan,G0001,63.0,8.0,30.0\n"
        b"2024-11-15 16:57:55,TXT_2_IMG,SUCCEED,1.0,G0001,63.0,1.5,30.0\n"
        b"2024-11-15 16:57:56,TXT_2_IMG,SUCCEED,1.0,G 1,63.0,1.0,30.0\n"
        b"2024-11-15 16:57:57,TXT_2_IMG,SUCCEED,1e9,G0001,63.0,1.0,30.0\n"
        b'2024-11-15 16:57:58,"two\nlines, one row",SUCCEED,.5,G0001,63.0,1.0,30.0\n'
    )
    trace = read(tmp_path, IMAGES + rows.replace(b",.5,", b",0.5,"))
    assert [(b.line, b.reason) for b in trace.bad_rows] == [
        (4, "predict_status: not finished (PENDING)"),
        (5, "predict_status: 'LOST' is none of SUCCEED, FAILED, PENDING"),
        (6, "exec_time_seconds: 'nan' is not a decimal number of at least 0"),
        (7, "num_images_per_prompt: '1.5' is not a whole number"),
        (8, "groupId: 'G 1' is not a client id of at most 64 letters, digits and ._:@+-"),
        (9, "exec_time_seconds: '1e9' is out of range, 0 to 180000 s"),
    ]
    done, failed, folded = trace.jobs
    assert (done.client, done.exec_time_us, done.image_count, done.num_steps) == ("G0000", 32_000_000, 1, 30)
    assert (done.status, done.modality, done.input_tokens) == ("success", "image", None)
    assert (failed.status, failed.exec_time_us, failed.image_count) == ("error", 3_123_456, None)
    assert (folded.line, folded.exec_time_us) == (10, 500_000)


def test_json_lines_and_their_bad_rows(tmp_path: Path) -> None:
    good = b'{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [1, 2.5]}\n'
    bad = [
        b'{"timestamp": 1, "input_length": 6955}\n',
        b'{"timestamp": 1, "input_length": 1.0, "output_length": 52}\n',
        b'{"timestamp": 1, "input_length": true, "output_length": 52}\n',
        b'{"timestamp": 1, "input_length": "7", "output_length": 52}\n',
        b'{"timestamp": NaN, "input_length": 7, "output_length": 52}\n',
        b'{"timestamp": -1, "input_length": 7, "output_length": 52}\n',
        b'{"timestamp": 1, "timestamp": 2, "input_length": 7, "output_length": 52}\n',
        b"[1, 2, 3]\n",
        b'{"timestamp": 1,\n',
        b'{"timestamp": 1, "input_length": \xff, "output_length": 52}\n',
        b"[" * 100_000 + b"\n",
        b"\n",
        b'{"timestamp": 1, "input_length": ' + b"9" * 5_000 + b', "output_length": 52}\n',
    ]
    trace = read(tmp_path, good + b"".join(bad) + good)
    assert [row.line for row in trace.bad_rows] == list(range(2, 2 + len(bad)))
    assert trace.bad_rows[0].reason == "output_length: is missing"
    assert trace.bad_rows[3].reason == "input_length: '7' is text, not a number"
    assert [(job.row, job.line) for job in trace.jobs] == [(1, 1), (15, 15)]
    assert iso(trace.jobs[0].arrival_us) == "2025-01-01T00:00:27.482000Z"
    assert trace.format.name == "json_llm"


def test_an_unknown_format_lists_what_was_found_and_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, b"when,ContextTokens\n1,2\n")
    assert "when, ContextTokens" in caught.value.message
    for name in ("azure_llm", "servegen", "image_log", "json_llm", "GeneratedTokens"):
        assert name in caught.value.remedy


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (gzip.compress(b""), "is empty"),
        (gzip.compress(AZURE + GOOD)[:-9], "gzip data is damaged"),
        (
            gzip.compress(AZURE + GOOD)[:20] + b"xxxx" + gzip.compress(AZURE + GOOD)[24:],
            "gzip data is damaged",
        ),
        (gzip.compress(AZURE + GOOD) + b"garbage", "gzip data is damaged"),
        (AZURE.replace(b"ContextTokens", b"TIMESTAMP") + GOOD, "named twice"),
        (b"\xff\xfeT\x00\n", "no header"),
        (b'{"a": 1}\n', "no known trace format has these columns: a"),
        (b"{\n", "no known trace format has these columns: none"),
        (AZURE, "no rows"),
    ],
)
def test_what_is_no_trace_is_refused_with_a_remedy(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, content)
    assert reason in caught.value.message
    assert caught.value.remedy


def test_a_trace_beyond_a_bound_is_refused_and_one_at_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(AZURE + GOOD * 3 + b"bad\n" * 2)
    assert len(read_trace(path, max_rows=5, max_bad_rows=2, max_text_bytes=path.stat().st_size).jobs) == 3
    with pytest.raises(UsageError, match="more than 4 rows"):
        read_trace(path, max_rows=4)
    with pytest.raises(UsageError, match=r"more than 1 rows are no jobs, the last in line 6: the row has 1 columns"):
        read_trace(path, max_bad_rows=1)
    with pytest.raises(UsageError, match="bytes of text"):
        read_trace(path, max_text_bytes=path.stat().st_size - 1)
    path.write_bytes(gzip.compress(AZURE + b"0" * 50 * MAX_LINE_BYTES))
    with pytest.raises(UsageError, match="bytes of text"):
        read_trace(path, max_text_bytes=10 * MAX_LINE_BYTES)


def test_a_file_is_not_held_in_memory(tmp_path: Path) -> None:
    content = AZURE + (b"1" * 2 * MAX_LINE_BYTES + b"\n") * 30 + GOOD
    for path, data in (tmp_path / "plain", content), (tmp_path / "zipped", gzip.compress(content, 1)):
        path.write_bytes(data)
        tracemalloc.start()
        trace = read_trace(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (len(trace.jobs), len(trace.bad_rows)) == (1, 30)
        assert trace.digest == hashlib.sha256(data).hexdigest()
        assert peak < len(content) / 4, peak


def test_a_missing_path_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            read_trace(path)


def test_the_generated_trace_is_fixed_by_its_seed() -> None:
    trace = generated_trace()
    assert trace == generated_trace(7, 1200)
    assert trace.digest == "900822bbac42ddbd65758dd587c6b08ce84c38807ae218043644d1d5c960630b"
    assert generated_trace(8).digest != trace.digest
    assert generated_trace(7, 1199).digest != trace.digest
    assert [job.row for job in trace.jobs] == list(range(1, 1201))
    arrivals = [job.arrival_us for job in trace.jobs]
    assert arrivals == sorted(arrivals)
    assert "2024-01-15T09:20" < iso(arrivals[0]) < "2024-01-15T09:21"
    assert "2024-01-15T10:49" < iso(arrivals[-1]) < "2024-01-15T10:50"
    assert {job.client for job in trace.jobs} == {f"client-{number:02d}" for number in range(1, 7)}


def test_each_generated_job_has_a_format_that_describes_it() -> None:
    trace = generated_trace()
    types = {job.modality: trace.format_of(job).model_type for job in trace.jobs}
    assert types == {"text": "llm", "image": "rectified_flow"}
    with pytest.raises(UsageError):
        trace.format_of(replace(trace.jobs[0], modality="sound"))
