"""Valid samples of everything that the fuzz targets read, and samples that are changed and signed or packed again."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from render_platform import batches, canonical, note
from render_platform.charges import records
from render_platform.gateway import ingest
from render_platform.keyring import Rotation
from tests.bundles import LAST, pack, unpack
from tests.made_receipts import Made
from tests.mutations import TOKENS, mutate, mutate_json
from tests.stories import signer

VECTORS = Path(__file__).parent / "vectors"
NOW_US = 1_700_157_600_000_000


def vector(name: str) -> Any:
    return json.loads((VECTORS / name).read_bytes())


def dumped(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")
    except RecursionError:
        return b'{"a":' * 3_000 + b"1" + b"}" * 3_000


SIGNER = note.FileSigner("example.com/log", Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = signer("example.com/recovery", 3)


def signed_note(text: bytes) -> bytes:
    """A note of any text: `sign_note` would refuse most."""
    mark = base64.b64encode(SIGNER.verifier.key_id + SIGNER.sign(text))
    return text + b"\n" + "— ".encode() + SIGNER.name.encode() + b" " + mark + b"\n"


X = base64.urlsafe_b64encode(SIGNER.verifier.public).decode().rstrip("=")
JWKS = dumped({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": X}]})
CURVE = ec.derive_private_key(5, ec.SECP256R1()).public_key().public_numbers()
POINT = [base64.urlsafe_b64encode(n.to_bytes(32, "big")).decode().rstrip("=") for n in (CURVE.x, CURVE.y)]
RSA_N = base64.urlsafe_b64encode(b"\xc5" + bytes(range(1, 256))).decode().rstrip("=")
JWKS_MORE = dumped(
    {
        "keys": [
            {"kty": "OKP", "crv": "Ed25519", "x": X, "kid": "a", "use": "sig", "alg": "EdDSA"},
            {"kty": "RSA", "n": RSA_N, "e": "AQAB", "kid": "b"},
            {"kty": "EC", "crv": "P-256", "x": POINT[0], "y": POINT[1], "kid": "c"},
        ]
    }
)


def span_sample() -> bytes:
    times = [{"name": n, "timeUnixNano": str(at)} for n, at in (("COMPUTE_START", 1_100), ("COMPUTE_END", 1_200))]
    attributes = [
        {"key": "triton.trace_parent_id", "value": {"intValue": "0"}},
        {"key": "triton.request_id", "value": {"stringValue": "mine"}},
    ]
    spans = [
        {"spanId": "c", "parentSpanId": "a", "events": times},
        {"spanId": "a", "parentSpanId": "http", "attributes": attributes},
    ]
    return dumped({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]})


def charge_samples() -> tuple[bytes, bytes]:
    ref = "ab" * 32
    line = records.Line(
        *(ref, "gpu-std", "gpu_second", "0.0019", 1, "1", "llama-8b", "standard", "any", "success", None),
        *(2, 0, 10**9, "0.0019", 10**9, 1, 7),
    )
    issued = records.Issued(ref, "gpu-std", "0.0019", "0.00", "0.00", "0.00")
    day = records.DayCharges(
        *(NOW_US, 1, "EUR", 2, "half_even", 1, "cd" * 32, 1, 0, 5, None, 2, 10**9, (line,), (issued,))
    )
    bill = records.InvoiceLine(ref, "gpu-std", "gpu_second", 10**9, 2, "0.00")
    return day.to_bytes(), records.Invoice("2023-11", 1, "EUR", 2, ("ef" * 32,), None, (bill,), "0.00").to_bytes()


CSV = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50,396,109\n",
    b"timestamp_ms,client_id,input_tokens,output_tokens\n12,c-1,10,20\n1700157600000,c-2,1,2\n",
    b"gmt_create,group_id,predict_status,exec_time_seconds,num_inference_steps\n"
    b'2023-11-16 18:15:46,g-1,SUCCEED,1.5,30\n2023-11-16 18:15:47,"g-2",FAILED,,30.0\n',
    b'{"timestamp": 27482, "input_length": 6955, "output_length": 52}\n{"timestamp": 3, "input_length": 1, '
    b'"output_length": 2.0}\n',
)
CONFIG = b"""gateway_port = 8081
batch_rows = 5_000
state_dir = "here"
[backends.triton-a]
kind = "triton"
url = "http://127.0.0.1:8000"
speed = 1.0
[models.flux-dev]
family = "flux"
modality = "image"
type = "rectified_flow"
tasks = ["text2image"]
aliases = ["black-forest-labs/FLUX.1-dev"]
backends = { triton-a = "flux_dev" }
"""
BOOK = b"""version = 3
currency = "EUR"
minor_digits = 2
rounding = "half_even"
[device_classes]
"GPU-8*" = "h100"
[[prices]]
from = 2023-01-01T00:00:00Z
billed = { success = "1", error = "0", timeout = "0.5", cancelled = "1" }
[[prices.rules]]
sku = "llm-out"
unit = "output_token"
price = "0.60"
per = 1_000_000
model = "llama-*"
"""
STREAM = (
    b': hi\n\ndata: {"id":"x","choices":[{"delta":{"content":"a"}}],"usage":null}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2},"timings":{"prompt_ms":0.0125,'
    b'"predicted_ms":0.02}}\r\n\r\ndata: [DONE]\n\n'
)
ANSWER = (
    b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2},"timings":{"prompt_ms":1,"predicted_ms":2.5}}'
)
FORM = (
    b'database=d\nmultipart/form-data; boundary=xx\n\n--xx\r\nContent-Disposition: form-data; name="query"\r\n\r\n'
    b'SELECT 1\r\n--xx\r\nContent-Disposition: form-data; name="param_a"\r\n\r\nb\r\n--xx--\r\n'
)
EVENT = {
    **{"specversion": "1.0", "type": ingest.TYPE, "source": "edge/a", "id": "1", "subject": "acme"},
    "time": "2023-11-16T18:00:00.5Z",
    "data": {
        **{"model": "flux-dev", "model_family": "flux", "model_type": "rectified_flow", "modality": "image"},
        **{"task": "text2image", "gpu_time_ns": 1_500_000_000, "gpu_started_at": "2023-11-16T17:59:00Z"},
        **{"input_dims": "512x512", "num_steps": 5, "energy_mj": 1},
    },
}
CLAIMS = {"iss": "https://id.example", "aud": "render", "sub": "acme", "exp": 1_700_160_000, "iat": 1_700_157_000}


def token_sample() -> bytes:
    parts = [base64.urlsafe_b64encode(dumped(part)).decode().rstrip("=") for part in ({"alg": "EdDSA"}, CLAIMS)]
    signed = ".".join(parts).encode()
    return signed + b"." + base64.urlsafe_b64encode(SIGNER.sign(signed)).rstrip(b"=")


def rotation_sample() -> bytes:
    old, new = signer("example.com/log", 1), signer("example.com/log", 2)
    rotation = Rotation("checkpoint", old.verifier, new.verifier, OTHER.verifier, 5, 1)
    return note.sign_note(rotation.text(), [old, new, OTHER]).encode()


def remake_receipt(rng: random.Random, sample: bytes) -> bytes:
    made = Made.of(sample.decode())
    extra = made.extra
    field = rng.choice(("entry", "event", ""))
    if field:
        extra[field] = dumped(mutate_json(rng, json.loads(extra[field]))).decode(errors="replace")
    else:
        extra = mutate_json(rng, extra)
    head = f"c2sp.org/tlog-proof@v1\nextra {base64.b64encode(dumped(extra)).decode()}\nindex {made.index}\n"
    return (head + "\n".join([*made.proof, "", made.body, made.signatures])).encode()


def remake_attestation(rng: random.Random, sample: bytes) -> bytes:
    envelope = json.loads(sample)
    statement = dumped(mutate_json(rng, json.loads(base64.b64decode(envelope["payload"]))))
    pae = b"DSSEv1 %d %s %d %s" % (28, batches.PAYLOAD_TYPE.encode(), len(statement), statement)
    envelope["payload"] = base64.b64encode(statement).decode()
    envelope["signatures"][0]["sig"] = base64.b64encode(SIGNER.sign(pae)).decode()
    return dumped(envelope)


def remake_bundle(rng: random.Random, sample: bytes) -> bytes:
    """One member changed, listed so in the manifest, and signed by the log's own key; or the manifest changed."""
    members = unpack(sample)
    manifest = json.loads(members["manifest.json"])
    if rng.random() < 0.7:
        name = rng.choice([name for name in members if name not in LAST])
        members[name] = mutate(rng, members[name], list(members.values()))
        manifest["members"] = [
            [one, len(data), canonical.digest_of(data)] for one, data in members.items() if one not in LAST
        ]
    else:
        manifest = mutate_json(rng, manifest)
    members[LAST[0]] = dumped(manifest)
    text = f"render-platform.dev/bundle/v1\n{canonical.digest_of(members[LAST[0]])}\n"
    members[LAST[1]] = note.sign_note(text, [signer("example.com/log", 1)]).encode()
    return pack(members)


def remake_batch(rng: random.Random, sample: bytes) -> bytes:
    """A Parquet file of the right schema, with values in one column that no event has."""
    table = batches.decode(sample)
    at = rng.randrange(table.num_columns)
    field, rows = table.schema.field(at), table.num_rows
    if pa.types.is_string(field.type):
        column = pa.array([rng.choice(TOKENS[:40]) for _ in range(rows)], pa.binary()).view(pa.string())
    elif rng.random() < 0.3:
        return batches.encode(table.slice(0, 0) if rng.random() < 0.5 else pa.concat_tables([table] * 3))
    else:
        column = pa.nulls(rows, field.type)
    return batches.encode(table.set_column(at, field.with_nullable(True), column))
