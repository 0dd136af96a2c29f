"""Server-sent events of OpenAI-compatible answers: framing, the chunks that carry figures, and the last event.

Shared by the backend that forwards such a stream and the one that makes one up. Nothing here waits or sends.
"""

from __future__ import annotations

import re

import msgspec

MAX_EVENT_BYTES = 1024 * 1024
DONE = b"data: [DONE]\n\n"
"""The last event of every stream."""

NULL = msgspec.Raw(b"null")
_END = re.compile(rb"\r?\n\r?\n")
_LONGEST_END = 4
_MARKS = (b'"usage"', b'"timings"', b'"error"')


class StreamOptions(msgspec.Struct):
    """A request's `stream_options`."""

    include_usage: bool | None = None


class Figures(msgspec.Struct):
    """What an answer, or a chunk of one, says about itself; the rest of it is never decoded.

    Figures stay raw: a server that puts something else there has answered all the same.
    """

    usage: msgspec.Raw = NULL
    timings: msgspec.Raw = NULL
    error: msgspec.Raw = NULL
    choices: list[msgspec.Raw] | None = None


figures_decoder = msgspec.json.Decoder(Figures)


def event(data: bytes) -> bytes:
    """An event that holds one line of JSON."""
    return b"data: " + data + b"\n\n"


def payload(whole: bytes) -> bytes:
    """The data of an event; empty for a comment."""
    return b"\n".join(line[5:].strip() for line in whole.splitlines() if line.startswith(b"data:"))


class EventSplitter:
    """Bytes as they come in, whole events out, byte for byte. At most MAX_EVENT_BYTES wait for their end."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The events that `data` completes, each with its blank line. ValueError where one is too long.

        The cost is that of `data`, however much is waiting: a server that sends byte by byte costs no more.
        """
        begin, search_from = 0, max(0, len(self._rest) - _LONGEST_END)
        self._rest += data
        events = []
        while found := _END.search(self._rest, max(begin, search_from)):
            events.append(bytes(self._rest[begin : found.end()]))
            begin = found.end()
        del self._rest[:begin]
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event has more than {MAX_EVENT_BYTES} bytes")
        return events


class Relay:
    """One stream on its way to a client, who gets each event as it came.

    Left out are the usage chunk where the client did not ask for it, `[DONE]` and what comes after it, and an error
    with what comes after it. `usage` and `timings` are the last ones seen.
    """

    def __init__(self, keep_usage: bool) -> None:
        self._keep_usage = keep_usage
        self._splitter = EventSplitter()
        self.figures = Figures()
        self.begun = False
        """Whether the client has got anything."""
        self.done = False
        self.failed = False

    def feed(self, data: bytes) -> bytes:
        """What goes to the client now. ValueError where the stream is none of events with JSON."""
        kept = []
        for whole in self._splitter.feed(data):
            if self.done or self.failed:
                break
            if self._goes_on(payload(whole)):
                kept.append(whole)
        self.begun = self.begun or bool(kept)
        return b"".join(kept)

    def _goes_on(self, data: bytes) -> bool:
        if data == b"[DONE]":
            self.done = True
            return False
        if not any(mark in data for mark in _MARKS):
            return True
        try:
            seen = figures_decoder.decode(data)
        except RecursionError as error:
            raise ValueError("a chunk is nested too deeply") from error
        if seen.error != NULL:
            self.failed = True
            return False
        if seen.timings != NULL:
            self.figures.timings = seen.timings
        if seen.usage == NULL:
            return True
        self.figures.usage = seen.usage
        return self._keep_usage or seen.choices != []
