"""Damage to valid samples: what an attacker, a broken disk or a careless sender makes of bytes that a parser reads.

`mutate` keeps most of a sample's structure, so that a parser gets past its first check: bytes are cut, flipped, put in
twice, inserted and spliced; numbers grow, text nests, lines move. Samples that are JSON are also changed value by
value, and written again in the form that canonical readers want. All randomness is the caller's.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

MAX_BYTES = 1 << 18
"""What a mutated sample is cut to."""

HUGE = b"9" * 5_000
"""More digits than Python turns into an integer."""
TOKENS: tuple[bytes, ...] = (
    *(b"\0", b"\\u0000", b"\\ud800", b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf"),
    *(b"\r\n", b"\r", b"\n\n", b"\x85", "\u2028".encode(), b"\x7f", b"\x1b[31m", "\u202e".encode(), b" ", b"\t"),
    *(b"-1", b"-0", b"0", b"00", b"1e5", b"1e400", b"1e-400", b"1e99999999999999999999", b"0x10", b"1_0", b"NaN"),
    *(b"Infinity", b"-Infinity", b"true", b"null", b"9223372036854775807", b"9223372036854775808", b"0.1", HUGE),
    *(b"18446744073709551616", b"340282366920938463463374607431768211456", "\u0661\u0662".encode(), b"1." + HUGE),
    *(
        b'"',
        b"'",
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"=",
        b";",
        b"--",
        b"#",
        b"%",
        b"+",
        b"*" * 40,
        b"A" * 70_000,
    ),
)
LEAVES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 2**128, 10**300, -(2**63), 0.5, 1e300),
    *("", "\0", "a\nb", "\ud800", "é", "A" * 70_000, "0" * 64, "-1", "1e400", "NaN", "\u202e", "2023-11-16T18:00:00Z"),
    *([], {}, [[]], [None], {"": None}, {"a": {"a": {}}}),
)


def mutate(rng: random.Random, sample: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One to four changes of `sample`; `others` are samples that a piece may come from."""
    data = sample
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        if rng.random() < 0.3 and (changed := _mutated_json(rng, data)) is not None:
            data = changed
        else:
            data = rng.choice(_CHANGES)(rng, data, others)
    return data[:MAX_BYTES]


def mutate_json(rng: random.Random, value: Any) -> Any:
    """`value` with one of its parts replaced, removed, doubled, renamed or nested."""
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        return rng.choice(LEAVES)
    container, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del container[key]
        case 1 if isinstance(container, list):
            container.insert(rng.randrange(len(container) + 1), container[key])
        case 1:
            container[rng.choice(("x", "", "\0", "é", f"{key} ", str(key).upper()))] = container[key]
        case 2:
            container[key] = [container[key]] if rng.random() < 0.5 else {"a": container[key]}
        case 3:
            container[key] = nested(rng.choice((10, 127, 129, 2_000)))
        case 4:
            other, place = rng.choice(places)
            container[key] = _copy(other[place])
        case 5 if isinstance(container[key], int):
            container[key] += rng.choice((-1, 1, 2**53, -(2**70)))
        case 6 if isinstance(container[key], str):
            container[key] = rng.choice(_TEXTS)(container[key])
        case _:
            container[key] = _copy(rng.choice(LEAVES))
    return value


def nested(depth: int) -> Any:
    found: Any = 0
    for _ in range(depth):
        found = [found]
    return found


_TEXTS: tuple[Callable[[str], str], ...] = (
    lambda text: text + "\0",
    lambda text: text[:-1],
    lambda text: text * 2,
    lambda text: text.upper(),
    lambda text: f" {text}",
    lambda text: f"{text}\n",
    lambda text: "+" + text,
)


def _copy(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except RecursionError:
        return None


def _places(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    if depth < 20 and isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            found += _places(value[key], depth + 1)
    return found


def _mutated_json(rng: random.Random, data: bytes) -> bytes | None:
    try:
        changed = mutate_json(rng, json.loads(data))
        spaces = (",", ":") if rng.random() < 0.9 else (", ", ": ")
        return json.dumps(changed, ensure_ascii=rng.random() < 0.1, separators=spaces).encode(errors="surrogatepass")
    except (ValueError, RecursionError):
        return None


Change = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def _cut(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flip(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + int(2 ** rng.uniform(0, 12)))


def _remove(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def _repeat(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[start:end] * rng.choice((2, 2, 3, 300)) + data[end:]


def _insert(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(TOKENS) + data[at:]


def _replace(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + rng.choice(TOKENS) + data[end:]


def _splice(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others or (data,))
    (start, end), (first, last) = _span(rng, data), _span(rng, other)
    return data[:start] + other[first:last] + data[end:]


def _number(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    """One of the numbers in the text becomes another one."""
    found = list(re.finditer(rb"[0-9]+", data[:20_000]))
    if not found:
        return data
    one = rng.choice(found)
    return data[: one.start()] + rng.choice(TOKENS[20:42]) + data[one.end() :]


def _nest(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    at, depth = rng.randrange(len(data) + 1), rng.choice((50, rng.randrange(200, 1_000), 1_000, 100_000))
    opened, closed = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"(", b")"), (b'"', b'"')))
    return data[:at] + (opened * depth)[:200_000] + b"1" + (closed * depth)[:200_000] + data[at:]


def _lines(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    lines = data.split(b"\n")
    at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            lines.insert(to, lines[at])
        case 1:
            lines[at], lines[to] = lines[to], lines[at]
        case 2:
            del lines[at]
        case _:
            return b"\r\n".join(lines)
    return b"\n".join(lines)


def _mark(rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\x1f\x8b\x08")) + data


def _wide(_rng: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    return data.decode("latin-1").encode("utf-16")


_CHANGES: tuple[Change, ...] = (
    *(_cut, _flip, _flip, _remove, _repeat, _insert, _insert, _replace, _splice, _splice, _number, _number, _nest),
    *(_lines, _mark, _wide),
)
