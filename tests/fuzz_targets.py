"""Every parser of bytes from outside, as a fuzz target: valid samples, and how one input is read.

`read` gives nothing and raises one of `errors`, with a message; whatever else it raises is a defect. Where a format is
canonical it also checks that what was read is written as the same bytes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from render_platform import batches, bridge_protocol, canonical, entries, note, receipt_verifier, tiles, traces
from render_platform.bundle import verify_bundle
from render_platform.charges import price_book, records
from render_platform.clock import SystemClock
from render_platform.config import load_settings
from render_platform.errors import PlatformError, UsageError
from render_platform.gateway import ingest, openai_backend, outbound, sse, triton_requests, triton_spans
from render_platform.gateway.backends import BackendFailure
from render_platform.gateway.catalogue import SIMULATED, ModelSpec, make_catalogue
from render_platform.gateway.tokens import Issuer, Tokens
from render_platform.keyring import Rotation
from render_platform.witness import Witness, WitnessState
from tests.factories import make_table
from tests.fuzz_samples import (
    ANSWER,
    BOOK,
    CONFIG,
    CSV,
    EVENT,
    FORM,
    JWKS,
    JWKS_MORE,
    NOW_US,
    OTHER,
    SIGNER,
    STREAM,
    VECTORS,
    charge_samples,
    dumped,
    remake_attestation,
    remake_batch,
    remake_bundle,
    remake_receipt,
    rotation_sample,
    signed_note,
    span_sample,
    token_sample,
    vector,
)
from tests.made_receipts import LOG, make
from tests.mutations import mutate, mutate_json
from tests.stories import MemoryObjects

OURS: tuple[type[Exception], ...] = (PlatformError,)


@dataclass(frozen=True)
class Target:
    name: str
    samples: tuple[bytes, ...]
    read: Callable[[bytes], None]
    errors: tuple[type[Exception], ...] = OURS
    remake: Callable[[random.Random, bytes], bytes] | None = None
    """Changes a sample and signs or packs it again, so that what is behind the first check is reached too."""

    def mutated(self, rng: random.Random) -> bytes:
        sample = rng.choice(self.samples)
        if self.remake is not None and rng.random() < 0.5:
            return self.remake(rng, sample)
        return mutate(rng, sample, self.samples)


def require(good: object, what: str) -> None:
    """Not an `assert`: a target also runs outside pytest."""
    if not good:
        raise RuntimeError(what)


# Records and the log.


def read_canonical(data: bytes) -> None:
    require(canonical.encode(canonical.decode(data)) == data, "encodes otherwise")


def read_entry(data: bytes) -> None:
    require(entries.parse(data).to_bytes() == data, "encodes otherwise")


def read_checkpoint(data: bytes) -> None:
    note.cosignatures_of(data.decode(errors="replace"), [note.WitnessKey.of("w", bytes(32))]) if len(data) % 2 else None
    require(note.claimed_checkpoint(data).text().encode() + b"\n" == data[: data.rindex(b"\n\n") + 2], "otherwise")
    note.read_checkpoint(data, [SIGNER.verifier])


def read_vkey(data: bytes) -> None:
    text = data.decode(errors="surrogateescape")
    require(note.Verifier.parse(text).vkey == text, "encodes otherwise")


def read_rotation(data: bytes) -> None:
    Rotation.open(data.decode(errors="replace"))


def read_tile_path(data: bytes) -> None:
    text = data.decode(errors="replace")
    tile = tiles.parse_path(text)
    if tile is None:
        raise UsageError("no tile")
    require(tiles.path_of(tile) == text, "names otherwise")


def read_bundle_tile(data: bytes) -> None:
    require(tiles.encode_bundle(tiles.decode_bundle(data)) == data, "encodes otherwise")


def read_receipt(data: bytes) -> None:
    receipt_verifier.verify_receipt(data, [LOG.vkey])


def read_attestation(data: bytes) -> None:
    batches.check_attestation(data, "ab" * 32, {SIGNER.verifier.vkey: SIGNER.verifier})


def read_batch(data: bytes) -> None:
    batches.predicate(batches.decode(data))


def witness_reader() -> Callable[[bytes], None]:
    store = MemoryObjects({"state.json": dumped({"logs": []})})
    witness = Witness(
        {SIGNER.name: [SIGNER.verifier]}, OTHER, WitnessState(store, store.read("state.json")), SystemClock()
    )

    def read(data: bytes) -> None:
        status = witness.add_checkpoint(data).status
        require(status in (200, 400, 403, 404, 409, 422), f"answers {status}")

    return read


# Files of the operator.


def file_reader(folder: Path, read: Callable[[Path], object]) -> Callable[[bytes], None]:
    path = folder / "input"

    def write_and_read(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    return write_and_read


def read_config(path: Path) -> None:
    make_catalogue(load_settings({}, config=path).catalogue)


def read_variables(data: bytes) -> None:
    text = data.decode(errors="surrogateescape").replace("\0", "")
    load_settings(
        {f"RENDER_PLATFORM_{n}": v for n, _, v in (line.partition("=") for line in text.splitlines()) if n != "CONFIG"}
    )


def read_book(data: bytes) -> None:
    for period in price_book.parse_price_book(data).periods:
        period.rules_for("standard", "llama-8b", "any")


def read_day(data: bytes) -> None:
    record = records.parse_day(data)
    require(record.to_bytes() == data, "encodes otherwise")
    record.amount  # noqa: B018


def read_invoice(data: bytes) -> None:
    require(records.parse_invoice(data).to_bytes() == data, "encodes otherwise")


def jwks_reader(folder: Path) -> Callable[[Path], object]:
    return lambda path: Tokens([Issuer("example", "https://id.example", "render", "sub", path)])


# What clients and servers send to the gateway.


def read_cloudevent(data: bytes) -> None:
    for event in ingest.parse(data, ingest.BATCH if data[:1] == b"[" else ingest.ONE):
        event.content_digest("key")


def remake_token(rng: random.Random, sample: bytes) -> bytes:
    parts = [json.loads(_unpadded(part)) for part in sample.split(b".")[:2]]
    parts[rng.randrange(2)] = mutate_json(rng, parts[rng.randrange(2)])
    signed = ".".join(base64.urlsafe_b64encode(dumped(part)).decode().rstrip("=") for part in parts).encode()
    return signed + b"." + base64.urlsafe_b64encode(SIGNER.sign(signed)).rstrip(b"=")


def _unpadded(part: bytes) -> bytes:
    return base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))


def token_reader(folder: Path) -> Callable[[bytes], None]:
    path = folder / "good.jwks"
    path.write_bytes(JWKS)
    tokens = Tokens([Issuer("example", "https://id.example", "render", "sub", path)])
    return lambda data: require(tokens.verify(data.decode(errors="replace"), NOW_US), "nobody")


def read_stream(data: bytes) -> None:
    """Cut into chunks, as they come from a socket."""
    relay = sse.Relay(keep_usage=len(data) % 2 == 0)
    step = max(1, len(data) // 7)
    for at in range(0, len(data), step):
        relay.feed(data[at : at + step])
    use(relay.figures)


def read_answer(data: bytes) -> None:
    try:
        figures = sse.figures_decoder.decode(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    use(figures)


def use(figures: sse.Figures) -> None:
    usage = openai_backend.usage_of(figures)
    for count in (usage.input_tokens, usage.output_tokens):
        require(count is None or 0 <= count <= 2**53, "a count out of range")
    for start, end in openai_backend.spans_of(figures, 1_000, 2_000) or []:
        require(1_000 <= start < end <= 2_000, "a span outside the attempt")


def utf8(data: bytes) -> bytes:
    """The edge has refused a body that is not UTF-8 before it is read further."""
    return data.decode(errors="replace").encode()


def read_openai_request(data: bytes) -> None:
    body, _ = openai_backend.prepare(utf8(data), "served", True)
    json.loads(body, parse_int=str)  # numbers go on as they came, of any length


def read_spans(data: bytes) -> None:
    async def read() -> None:
        book = triton_spans.SpanBook()
        with book.awaiting("mine") as mine:
            book.add(data)
            spans = triton_spans.fitted(mine.result(), 1_000, 2_000) if mine.done() else None
            require(all(1_000 <= start < end <= 2_000 for start, end in spans or []), "a span outside the attempt")

    asyncio.run(read())


MODEL = ModelSpec(
    family="f", modality="image", type="other", tasks=["t"], backends={}, inputs={"prompt": "BYTES", "steps": "INT32"}
)


def read_triton_request(data: bytes) -> None:
    json.loads(triton_requests.inference_body(MODEL, utf8(data), "id", {"prompt": 2}), parse_int=str)


def read_url(data: bytes) -> None:
    outbound.parse_url(data.decode(errors="replace"), frozenset({"localhost:9000"}))


def read_bridge(data: bytes) -> None:
    """Line by line: the query, a content type, an encoding; the rest is the body."""
    query, kind, encoding, body = [*data.split(b"\n", 3), b"", b"", b""][:4]
    headers = {b"content-type": kind, b"content-encoding": encoding or b"identity", b"authorization": kind}
    bridge_protocol.password(headers)
    request = bridge_protocol.read_request("POST", query, headers, body)
    bridge_protocol.success(request, b"", "UTC", {})
    bridge_protocol.failure(body.decode(errors="replace"))


def make_targets(folder: Path) -> dict[str, Target]:
    """All targets, by name; some keep files in `folder`."""
    spec, bundle = vector("spec.json"), vector("bundle.json")
    logged = tuple(text.encode() for text in spec["log"]["entries"])
    checkpoint = note.Checkpoint(SIGNER.name, 5, bytes(32)).text().encode()
    keys = [note.Verifier.parse(vkey) for vkey in bundle["keys"]]
    day, invoice = charge_samples()
    attested = batches.attest("2023-11-16T18-00000", "ab" * 32, make_table(5, 1), SIGNER, "render-platform/1")
    lines = b"GATEWAY_PORT=8080\nSTATE_DIR=~/a\nCO2_G_PER_KWH=30\nWITNESS_POLICY=hold\n"
    request = b"old 0\n\n" + signed_note(checkpoint)
    found = (
        Target("canonical", (*logged, *(text.encode() for text in spec["events"])), read_canonical),
        Target("entry", logged, read_entry),
        Target(
            "checkpoint",
            (signed_note(checkpoint),),
            read_checkpoint,
            remake=lambda rng, _: signed_note(mutate(rng, checkpoint)),
        ),
        Target("vkey", (SIGNER.verifier.vkey.encode(),), read_vkey),
        Target("rotation", (rotation_sample(),), read_rotation),
        Target("witness", (request,), witness_reader()),
        Target("tile-path", (b"tile/0/x001/x234/067.p/8", b"tile/entries/000.p/3"), read_tile_path),
        Target("entry-bundle", (tiles.encode_bundle(logged), b""), read_bundle_tile),
        Target(
            "receipt",
            (make().text().encode(), make(erasure="proven", opening=None).text().encode()),
            read_receipt,
            (receipt_verifier.InvalidReceipt,),
            remake_receipt,
        ),
        Target("attestation", (attested,), read_attestation, remake=remake_attestation),
        Target(
            "batch",
            (batches.encode(make_table(5, 1)), (VECTORS / "spec.parquet").read_bytes()),
            read_batch,
            remake=remake_batch,
        ),
        Target(
            "bundle",
            ((VECTORS / "bundle.tar").read_bytes(),),
            file_reader(folder, lambda path: verify_bundle(path, keys)),
            remake=remake_bundle,
        ),
        Target("trace", CSV, file_reader(folder, traces.read_trace)),
        Target("config", (CONFIG,), file_reader(folder, read_config)),
        Target("variables", (lines,), read_variables),
        Target("catalogue", (dumped(SIMULATED),), lambda data: require(make_catalogue(_object(data)), "none")),
        Target("price-book", (BOOK,), read_book),
        Target("day-charges", (day,), read_day),
        Target("invoice", (invoice,), read_invoice),
        Target("cloudevents", (dumped(EVENT), dumped([EVENT, EVENT])), read_cloudevent),
        Target("token", (token_sample(),), token_reader(folder), remake=remake_token),
        Target("jwks", (JWKS, JWKS_MORE), file_reader(folder, jwks_reader(folder))),
        Target("openai-stream", (STREAM,), read_stream, (ValueError,)),
        Target("openai-answer", (ANSWER,), read_answer, (ValueError,)),
        Target("openai-request", (b'{"stream":true,"stream_options":{}}',), read_openai_request, (BackendFailure,)),
        Target("triton-spans", (span_sample(),), read_spans, (ValueError,)),
        Target(
            "triton-request",
            (b'{"prompt":"a","steps":5}', b'{"inputs":[{"name":"a","shape":[1],"datatype":"BYTES","data":["x"]}]}'),
            read_triton_request,
        ),
        Target("webhook-url", (b"https://example.com:8443/a?b=c", b"http://[2001:db8::1]/"), read_url),
        Target("bridge", (FORM, b"query=INSERT+INTO+t+FORMAT+CSV\n\n\n1,2\n"), read_bridge),
    )
    return {target.name: target for target in found}


def _object(data: bytes) -> dict[str, Any]:
    """What is no object cannot come from a file of TOML."""
    try:
        value = json.loads(data)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UsageError("no tables")
    return value
