"""The benchmark's own arithmetic, table and checks, and its two bare servers. No peer is installed or started."""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import echo
from benchmarks.load import (
    Load,
    Request,
    apply_load,
    count_right_answers,
    parse_load,
    wait_for_first_answer,
)
from benchmarks.processes import Server, free_port, run_tool, running
from benchmarks.report import BEGIN, END, Exact, Report, Result, Round, findings, render, replace_section
from benchmarks.subjects import (
    CHAT,
    CHAT_PATH,
    JOB,
    QUEUE_PATH,
    ROOM,
    Counts,
    is_accepted,
    is_completion,
    make_config,
    make_subjects,
    parse_counts,
    start_bare,
)
from render_platform.config import load_settings
from render_platform.errors import Finding, Unavailable
from render_platform.gateway.catalogue import make_catalogue

FIGURES = {
    "answers": 1_000,
    "duration_us": 2_000_000,
    "p50_us": 1_340,
    "p99_us": 2_790,
    "bad_status": 0,
    "socket_errors": 0,
    "timeouts": 0,
}
CHAT_REQUEST = Request(CHAT_PATH, CHAT, 200, is_completion)
JOB_REQUEST = Request(QUEUE_PATH, JOB, 202, is_accepted)


def load(**figures: int) -> Load:
    return Load(**{**FIGURES, **figures})


def measured(counts: Counts | None = None, exact: Exact | None = None, **figures: int) -> Round:
    return Round(load(**figures), 50_000, 1_500, 32, counts, exact)


def report(*results: Result) -> Report:
    return Report("2026-01-01T00:00:00Z", 16, 10, 3, {"cores": "2"}, {"wrk": "4.1.0"}, list(results))


def test_the_line_of_figures_is_found_in_what_wrk_prints() -> None:
    output = f"Running 10s test @ http://127.0.0.1:1/\n  1000 requests in 2.00s\n{json.dumps(FIGURES)}\n"
    assert parse_load(output) == load()
    assert load().per_second == 500


@pytest.mark.parametrize(
    "output",
    [
        "",
        "unable to connect to 127.0.0.1:1 Connection refused",
        '{"answers":1}',
        '{"answers":',
        json.dumps({**FIGURES, "duration_us": 0}),
        json.dumps({**FIGURES, "p99_us": -9223372036854775808.5}),
    ],
)
def test_what_holds_no_figures_is_no_result(output: str) -> None:
    with pytest.raises(Unavailable):
        parse_load(output)


def test_only_good_answers_count_as_speed() -> None:
    spoiled = load(bad_status=400, timeouts=2, socket_errors=3)
    assert (spoiled.good, spoiled.errors, spoiled.per_second) == (600, 405, 300)


def test_the_table_shows_median_and_spread_and_lines_up() -> None:
    rounds = [measured(answers=count) for count in (2_000, 9_000, 3_000)]
    text = render(report(Result("a", "bare", rounds), Result("e", "other", [], "no such package")))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert "1,500 (1,000–4,500)" in table[2]
    assert "1.34 (1.34–1.34)" in table[2]
    assert "not measured" in table[3]
    assert "(e) not measured: no such package" in text
    assert "cores: 2" in text
    assert "wrk 4.1.0" in text


def test_ratios_are_those_of_each_round() -> None:
    ours = Result("d", "ours", [measured(answers=4_000), measured(answers=6_000), measured(answers=9_000)])
    other = Result("f", "other", [measured(answers=2_000), measured(answers=1_000), measured(answers=3_000)])
    assert "d/f: 3.00 (2.00–6.00)" in render(report(ours, other))
    assert "d/e" not in render(report(ours, other))
    assert "d/e: not measured" in render(report(ours, Result("e", "gone", [], "not installed")))


def test_a_clean_run_has_no_findings() -> None:
    kept = measured(Counts(1_510, 1_510, 1_510), Exact(1_001, 1_001, 1_001))
    accepted_only = measured(Counts(1_532, 10, 10))
    clean = report(Result("c", "accept", [accepted_only]), Result("d", "forward", [kept]))
    assert findings(clean) == []
    assert "FINDINGS" not in render(clean)


@pytest.mark.parametrize(
    ("done", "said"),
    [
        (measured(bad_status=7), "7 answers of 400 and above"),
        (measured(timeouts=1), "1 time-outs"),
        (measured(Counts(1_499, 1_499, 1_499)), "1500 good answers, but 1499 accepted"),
        (measured(Counts(1_533, 1_533, 1_533)), "1500 good answers, but 1533 accepted"),
        (measured(Counts(1_500, 1_500, 1_499), Exact(1_001, 1_001, 1_001)), "1500 finished, 1499 events"),
        (measured(Counts(1_500, 1_500, 1_500), Exact(1_001, 1_001, 1_000)), "1001 answered, 1000 events"),
        (measured(Counts(1_500, 1_500, 1_500), Exact(1_001, 1_000, 1_001)), "1000 answered, 1001 events"),
    ],
)
def test_errors_and_lost_or_doubled_events_are_said_loudly(done: Round, said: str) -> None:
    spoiled = report(Result("d", "forward", [done]))
    assert [text for text in findings(spoiled) if said in text]
    assert "FINDINGS" in render(spoiled)


def test_a_report_keeps_every_round_as_json() -> None:
    whole = report(Result("d", "forward", [measured(Counts(1, 1, 1), Exact(1, 1, 1)), measured()]))
    assert msgspec.json.decode(msgspec.json.encode(whole), type=Report) == whole


def test_a_section_is_replaced_where_it_stands_and_appended_where_it_is_not() -> None:
    first = replace_section("# Benchmarks\n", "old")
    assert first == f"# Benchmarks\n\n{BEGIN}\nold\n{END}\n"
    assert replace_section(first + "\nafter\n", "new") == f"# Benchmarks\n\n{BEGIN}\nnew\n{END}\n\nafter\n"
    assert replace_section("", "new") == f"{BEGIN}\nnew\n{END}\n"


@given(before=st.text("ab\n #", max_size=20), after=st.text("ab\n #", max_size=20), section=st.text("cd\n|"))
def test_what_is_around_a_section_stays(before: str, after: str, section: str) -> None:
    once = replace_section(f"{before}{BEGIN}old{END}{after}", section)
    assert once == f"{before}{BEGIN}\n{section}\n{END}{after}"
    assert replace_section(once, section) == once


def test_counts_are_read_from_the_status_object() -> None:
    assert parse_counts('{"accepted":3,"finished":2,"events":1,"backlog":0}') == Counts(3, 2, 1)
    for broken in ("", "[]", '{"accepted":3}', '{"accepted":3,"finished":2,"events":null}'):
        with pytest.raises(Unavailable):
            parse_counts(broken)


@pytest.mark.parametrize("backend", ['kind = "simulated"', 'kind = "openai"\nurl = "http://127.0.0.1:8100/v1"'])
def test_the_gateways_configuration_is_valid_and_leaves_room(backend: str, tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(make_config(backend, 64))
    settings = load_settings({}, config=file)
    model = make_catalogue(settings.catalogue).resolve(echo.MODEL)
    assert model is not None
    assert min(model.max_queue, settings.rate_per_s, settings.burst) == ROOM


@pytest.fixture(scope="module", params=["echo", "accept"])
def bare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Request]]:
    with start_bare(sys.executable, request.param, tmp_path_factory.mktemp(request.param)) as server:
        asked = CHAT_REQUEST if request.param == "echo" else JOB_REQUEST
        wait_for_first_answer(server, asked)
        yield server, asked


def test_each_answer_of_the_bare_servers_is_right(bare: tuple[Server, Request]) -> None:
    server, asked = bare
    assert count_right_answers(server, asked, 4, 50) == 50
    assert server.cpu_us() > 0


def test_a_wrong_answer_is_a_finding_before_any_load(bare: tuple[Server, Request]) -> None:
    server, asked = bare
    for wrong in (Request("/nowhere", asked.body, asked.status, asked.has_shape), _expecting(asked, 299)):
        with pytest.raises(Finding):
            wait_for_first_answer(server, wrong)
        assert count_right_answers(server, wrong, 2, 4) == 0


def _expecting(asked: Request, status: int) -> Request:
    return Request(asked.path, asked.body, status, asked.has_shape)


@pytest.mark.skipif(shutil.which("wrk") is None, reason="LOAD NOT TESTED: wrk is not installed")
def test_wrk_counts_good_and_bad_answers(bare: tuple[Server, Request]) -> None:
    server, asked = bare
    good = apply_load(server, asked, 2, 1)
    assert good.good > 100
    assert good.errors == 0
    assert 0 < good.p50_us <= good.p99_us < 1_000_000
    bad = apply_load(server, Request("/nowhere", asked.body, 200, asked.has_shape), 2, 1)
    assert bad.good == 0
    assert bad.bad_status == bad.answers > 0


def test_a_job_of_another_shape_is_refused(bare: tuple[Server, Request]) -> None:
    server, asked = bare
    if asked is JOB_REQUEST:
        wrong: dict[str, Any] = {**JOB, "input": "none"}
        wait_for_first_answer(server, Request(QUEUE_PATH, wrong, 400, lambda answer: "detail" in answer))


def test_a_server_and_its_children_end_with_the_block(tmp_path: Path) -> None:
    """The child ignores SIGTERM, and its parent leaves it behind."""
    child = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid); p.wait()"
    with running("two", [sys.executable, "-u", "-c", parent], free_port(), tmp_path) as server:
        while "up" not in server.log.read_text():
            server.require_running()
        pid = next(line for line in server.log.read_text().splitlines() if line.isdigit())
        ended = os.pidfd_open(int(pid))
    assert select.select([ended], [], [], 10)[0]
    os.close(ended)


def test_a_server_that_ends_by_itself_says_why(tmp_path: Path) -> None:
    with running("early", [sys.executable, "-c", "exit('no such option')"], free_port(), tmp_path) as server:
        with pytest.raises(Unavailable, match="no such option"):
            wait_for_first_answer(server, CHAT_REQUEST)
        with pytest.raises(Unavailable):
            server.require_running()


def test_a_missing_or_failing_tool_is_said_in_one_line() -> None:
    with pytest.raises(Unavailable, match="is not installed"):
        run_tool(["no-such-program-here"], 10)
    with pytest.raises(Unavailable, match="failed with 3: broken"):
        run_tool([sys.executable, "-c", "import sys; print('broken', file=sys.stderr); sys.exit(3)"], 60)


def test_there_are_six_subjects_and_only_forwarding_bills(bare: tuple[Server, Request], tmp_path: Path) -> None:
    subjects = make_subjects(sys.executable, "render-platform", tmp_path, bare[0])
    assert "".join(subject.letter for subject in subjects) == "abcdef"
    assert [subject.letter for subject in subjects if subject.bills] == ["d"]
