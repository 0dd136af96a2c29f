"""Streams of events on their way from a server to a client: the same bytes, without what nobody asked for."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from render_platform.gateway.sse import MAX_EVENT_BYTES, EventSplitter, Relay
from tests.gateway.fake_openai import DONE, LAST, TWO


@given(st.lists(st.sampled_from([*TWO, LAST, b": c\n\n", b"data: a\r\n\r\n"])), st.lists(st.integers(1, 40)))
def test_events_are_the_same_however_their_bytes_are_cut(parts: list[bytes], sizes: list[int]) -> None:
    whole, splitter, found, at = b"".join(parts), EventSplitter(), [], 0
    for size in [*sizes, len(whole)]:
        found += splitter.feed(whole[at : at + size])
        at += size
    assert found == parts


def test_an_event_without_end_is_not_kept_for_ever() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"x" * MAX_EVENT_BYTES) == []
    with pytest.raises(ValueError, match="more than"):
        splitter.feed(b"x")
    with pytest.raises(ValueError, match="deep"):
        Relay(keep_usage=False).feed(b'data: {"usage":' + b"[" * 100_000 + b"\n\n")


def test_bytes_cost_the_same_however_many_wait_before_them() -> None:
    """A server that sends one long event byte by byte keeps nobody else from the loop."""
    splitter = EventSplitter()

    def cost_s(count: int) -> float:
        begin = time.process_time()
        for _ in range(count):
            splitter.feed(b"x")
        return time.process_time() - begin

    early = cost_s(20_000)
    splitter.feed(b"x" * (MAX_EVENT_BYTES - 60_000))
    late = cost_s(20_000)
    assert late < 8 * early + 0.05, (early, late)


def test_what_a_model_says_is_never_taken_for_figures() -> None:
    quoting = b'data: {"choices":[{"delta":{"content":"\\"usage\\": [] \\"error\\": 1 [DONE]"}}]}\n\n'
    relay = Relay(keep_usage=False)
    assert relay.feed(quoting) == quoting
    assert (relay.done, relay.failed) == (False, False)


def test_a_chunk_with_choices_and_usage_goes_on_and_the_last_figures_count() -> None:
    first = b'data: {"choices":[{"delta":{}}],"usage":{"completion_tokens":1}}\n\n'
    relay = Relay(keep_usage=False)
    assert relay.feed(first + LAST + DONE + first) == first
    assert relay.done
    assert b'"completion_tokens": 2' in bytes(relay.figures.usage)
