"""Those who watch a job are told all of it, once; those who wait for one and go away have cancelled it."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from render_platform.gateway.jobs import Job
from render_platform.gateway.submission import WATCH_AFTER_S
from tests.gateway.http import CHAT, CHAT_PATH, JSON, Client, Event, Running, eventually, occupied, running

END_ID = 1_001
STREAM = {"model": "llama-8b", "stream": True, **CHAT}


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("events") / "state") as made:
        yield made


@pytest.fixture
def client(at: Running) -> Client:
    return at.client()


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Event]]:
    """What the watcher of a job that does not end gets, from the beginning of this module on."""
    got: list[Event] = []
    with running(tmp_path_factory.mktemp("quiet") / "state") as at, occupied(at) as job_id:
        watching = threading.Thread(target=got.extend, args=[at.client().events(job_id)])
        watching.start()
        yield got
        at.stage.release()
        watching.join()


def has_watchers(job: Job, count: int) -> bool:
    return len(job.watchers) == count


def has_jobs(at: Running, count: int) -> bool:
    return at.counts()["jobs"] == count


def told(events: Iterator[Event]) -> list[Event]:
    """Without the positions, which are told again to whoever connects again."""
    return [event for event in events if event.name != "position"]


# Watching.


def test_a_watcher_is_told_of_everything_in_order(at: Running, client: Client) -> None:
    with occupied(at):
        before, job_id = (client.queue(model="solo", input={**CHAT, "do": wish})["id"] for wish in (None, "steps"))
        events = client.events(job_id)
        assert next(events) == Event(1, "queued", {})
        position = next(events)
        assert (position.id, position.name, position.data["position"]) == (None, "position", 1)
        client.ask("DELETE", f"/jobs/{before}")
        assert next(events).data["position"] == 0
        at.stage.working.clear()
        at.stage.release()
        assert next(events) == Event(2, "started", {"attempt": 1, "backend": "narrow"})
        assert [next(events).data for _ in range(2)] == [{"done": 1, "of": 2}, {"done": 2, "of": 2}]
        at.stage.release()
        *progress, last = events
    assert {event.name for event in progress} == {"progress"}
    job = client.get(f"/jobs/{job_id}").json
    used = {"gpu_seconds": job["usage"]["gpu_seconds"], "gpu_device": "GPU-sim-01"}
    assert last == Event(END_ID, "complete", used)


@pytest.mark.parametrize(
    ("wish", "names", "end"),
    [
        ("fail", ["started", "error"], {"status": "error", "code": "backend_error", "message": "it broke"}),
        (
            "stop",
            ["started", "retry", "queued", "started", "retry", "queued", "started", "error"],
            {"status": "error", "code": "backend_error", "message": "it broke"},
        ),
    ],
)
def test_a_failure_is_told_with_its_attempts(client: Client, wish: str, names: list[str], end: dict[str, Any]) -> None:
    events = told(client.events(client.queue(input={**CHAT, "do": wish})["id"]))
    assert [event.name for event in events if event.name in ("started", "retry", "error")] == [
        name for name in names if name != "queued"
    ]
    assert events[-1] == Event(END_ID, "error", end)


def test_a_cancelled_job_ends_its_stream(at: Running, client: Client) -> None:
    with occupied(at) as job_id:
        events = client.events(job_id)
        assert next(events).name == "started"
        client.ask("DELETE", f"/jobs/{job_id}")
        assert next(events).data["code"] == "cancelled_by_client"
        assert list(events) == []


# Connecting again.


def test_from_wherever_a_client_resumes_it_gets_the_rest(client: Client) -> None:
    job_id = client.queue()["id"]
    everything = told(client.events(job_id))
    numbers = [event.id for event in everything]
    assert numbers[:-1] == list(range(1, len(numbers)))
    assert numbers[-1] == END_ID
    for at, event in enumerate(everything[:-1]):
        assert told(client.events(job_id, after=event.id)) == everything[at + 1 :]
    for after in (END_ID, 10**8):
        assert client.get(f"/jobs/{job_id}/events", last_event_id=str(after)).status == 204
    for nonsense in ("x", "-1", "1.5", "9" * 30):
        reply = client.get(f"/jobs/{job_id}/events", last_event_id=nonsense)
        assert reply.body.count(b"event: ") == len(everything)


def test_a_broken_connection_loses_and_repeats_nothing(at: Running, client: Client) -> None:
    with occupied(at) as _:
        job_id = client.queue(model="solo", input={**CHAT, "do": "steps"})["id"]
        first = client.events(job_id)
        got = [next(first)]
        first.close()
    while got[-1].id != END_ID:
        events = client.events(job_id, after=got[-1].id)
        for event in events:
            if event.id is None:
                continue
            got.append(event)
            if event.data == {"done": 2, "of": 2}:
                at.stage.release()
            break
        events.close()
    numbers = [event.id or 0 for event in got]
    assert all(one < other for one, other in pairwise(numbers))
    assert got == told(client.events(job_id))


def test_after_a_restart_the_end_is_told_as_it_was(tmp_path: Path) -> None:
    jobs: dict[str, Event] = {}
    with running(tmp_path / "state") as at:
        for wish in (None, "fail"):
            job_id = at.client().queue(input={**CHAT, **({"do": wish} if wish else {})})["id"]
            [*_, jobs[job_id]] = at.client().events(job_id)
    with running(tmp_path / "state") as at:
        for job_id, end in jobs.items():
            [again] = at.client().events(job_id, after=3)
            assert again == end._replace(data={**end.data, **({"message": ""} if "message" in end.data else {})})
            assert at.client().get(f"/jobs/{job_id}/events", last_event_id=str(END_ID)).status == 204


def test_a_watcher_that_goes_away_leaves_nothing_behind(at: Running, client: Client) -> None:
    with occupied(at) as held:
        job_id = client.queue(model="solo")["id"]
        for name in (held, job_id):
            job = at.gateway.engine.jobs[uuid.UUID(name)]
            watching = [client.events(name) for _ in range(5)]
            for events in watching:
                next(events)
            eventually(partial(has_watchers, job, 5))
            for events in watching:
                events.close()
            eventually(partial(has_watchers, job, 0))
        assert client.get(f"/jobs/{held}").json["state"] == "running"
    assert client.ended(job_id)["state"] == "success"


# Clients that wait, and go away.


def last_job(at: Running) -> dict[str, Any]:
    names = ("job_id", "state", "error_code", "direct")
    [row] = at.sql(f"SELECT {', '.join(names)} FROM jobs ORDER BY seq DESC LIMIT 1")
    return dict(zip(names, row, strict=True))


def check_gone(at: Running, worked: bool) -> None:
    """The last job was cancelled, because its client went away; what it used is metered."""
    eventually(lambda: last_job(at)["state"] not in ("queued", "running"))
    job = last_job(at)
    assert (job["state"], job["error_code"]) == ("cancelled", "client_gone")
    query = "SELECT status, error_code, gpu_time_ns > 0 FROM usage_events WHERE job_id = ?"
    assert at.sql(query, job["job_id"]) == [("cancelled", "client_gone", int(worked))]
    eventually(lambda: not at.gateway.fleet.servers["wide"].running)


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT_PATH, CHAT), ("/v1/chat/completions", {**STREAM, "stream": False}), ("/v1/chat/completions", STREAM)],
)
def test_a_client_that_goes_away_has_cancelled(at: Running, client: Client, path: str, body: Any) -> None:
    at.stage.working.clear()
    at.stage.left.clear()
    with client.begun(path, {**body, "do": "hold"}):
        assert at.stage.working.wait(10)
    assert at.stage.left.wait(10), "the backend works on"
    check_gone(at, worked=True)


def test_a_client_that_goes_away_with_a_key_comes_back_for_its_output(at: Running, client: Client) -> None:
    at.stage.working.clear()
    held = {**CHAT, "do": "hold"}
    with client.begun(CHAT_PATH, held, **{"Idempotency-Key": "gone"}):
        assert at.stage.working.wait(10)
    time.sleep(2 * WATCH_AFTER_S)
    at.stage.release()
    again = client.post(CHAT_PATH, held, idempotency_key="gone")
    assert again.status == 200
    (found,) = at.sql("SELECT state FROM jobs JOIN idempotency_keys USING (job_id) WHERE key = 'gone'")
    assert found == ("success",)


@pytest.mark.parametrize("pieces", [1, 200])
def test_a_client_that_leaves_its_stream_has_cancelled(at: Running, client: Client, pieces: int) -> None:
    at.stage.left.clear()
    asked = json.dumps({**STREAM, "do": "trickle"}).encode()
    connection, response = client.open("POST", "/v1/chat/completions", asked, JSON)
    for _ in range(pieces):
        assert response.readline().startswith(b"data: {")
        assert response.readline() == b"\n"
    response.close()
    connection.close()
    assert at.stage.left.wait(10), "the backend works on"
    check_gone(at, worked=True)


def test_a_client_that_does_not_read_holds_its_backend_up_and_nothing_else(at: Running, client: Client) -> None:
    at.stage.working.clear()
    at.stage.left.clear()
    with client.begun("/v1/chat/completions", {**STREAM, "do": "trickle"}):
        assert at.stage.working.wait(10)
        assert client.post(CHAT_PATH, CHAT).status == 200
        assert not at.stage.left.is_set()
    assert at.stage.left.wait(10), "the backend works on"


def test_a_client_that_goes_away_from_the_queue_has_cancelled_too(at: Running, client: Client) -> None:
    with occupied(at):
        for path, asked in (("/text/llama/solo/chat", CHAT), ("/v1/chat/completions", {**STREAM, "model": "solo"})):
            before = at.counts()["jobs"]
            with client.begun(path, asked):
                eventually(partial(has_jobs, at, before + 1))
            check_gone(at, worked=False)


@pytest.mark.parametrize(("path", "body"), [(CHAT_PATH, CHAT), ("/v1/chat/completions", STREAM)])
def test_who_only_waits_for_anothers_job_cancels_nothing(at: Running, client: Client, path: str, body: Any) -> None:
    at.stage.working.clear()
    at.stage.left.clear()
    held, named = {**body, "do": "hold"}, {"Idempotency-Key": str(uuid.uuid4())}
    with client.begun(path, held, **named):
        assert at.stage.working.wait(10)
        [job] = at.gateway.engine.jobs.values()
        with client.begun(path, held, **named):
            eventually(partial(has_watchers, job, 1))
        assert not at.stage.left.wait(0.3), "somebody else's job was cancelled"
    if body is STREAM:
        assert at.stage.left.wait(10), "its own client has left a stream, which nobody can come back for"
    at.stage.release()
    eventually(lambda: not at.gateway.engine.jobs)


def test_the_quiet_stream_was_kept_alive(quiet: list[Event]) -> None:
    eventually(lambda: any(event.name == "comment" for event in quiet))
