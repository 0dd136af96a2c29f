"""The receipt verifier: against committed receipts, receipts built here with nothing of ours, and mutations of both."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render_platform import receipt_verifier
from render_platform.receipt_verifier import MAX_RECEIPT_BYTES, InvalidKey, InvalidReceipt, Proven, verify_receipt
from tests.made_receipts import LOG, ORIGIN, SEER, Made, encoded, make, other_key

MODULE = Path(str(receipt_verifier.__file__))
FOLDER = Path(__file__).parent / "vectors"
GOOD = (FOLDER / "receipt.tlog-proof").read_text()
ERASED = (FOLDER / "receipt-erased.tlog-proof").read_text()
VECTOR = json.loads((FOLDER / "receipt.json").read_text())
EXTRA = base64.b64decode(GOOD.split()[2])
VKEY, WITNESS = VECTOR["vkey"], VECTOR["witness"]


def read(text: str | bytes) -> Proven:
    return verify_receipt(text, [LOG.vkey], [SEER.vkey])


# What is proven.


def test_the_committed_receipt_proves_what_its_vector_says() -> None:
    expected = VECTOR["proven"] | {"signed_by": (VKEY,)}
    assert verify_receipt(GOOD, [VKEY], [WITNESS])._asdict() == expected
    assert verify_receipt(GOOD.encode(), [VKEY]) == Proven(**(expected | {"witnesses": {}}))


def test_the_committed_receipt_of_one_who_was_erased() -> None:
    before, after = verify_receipt(GOOD, [VKEY]), verify_receipt(ERASED, [VKEY])
    assert (after.identity, after.customer_id) == ("identity erased", None)
    assert (after.event, after.entry, after.entry_index) == (before.event, before.entry, before.entry_index)
    assert "acme-studio" not in base64.b64decode(ERASED.split("\n")[1].split(" ")[1]).decode()


@pytest.mark.parametrize("text", [GOOD, ERASED, make().text()], ids=["good", "erased", "made"])
def test_a_receipt_has_one_form(text: str) -> None:
    assert Made.of(text).text() == text


@settings(max_examples=150)
@given(data=st.data(), rows=st.integers(1, 70), size=st.integers(1, 70))
def test_every_place_in_trees_of_every_size(data: st.DataObject, rows: int, size: int) -> None:
    at, index = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, size - 1))
    proven = read(make(rows, at, size, index).text())
    assert (proven.event_index, proven.entry_index, proven.tree_size) == (at, index, size)
    assert (proven.identity, proven.customer_id) == ("opened", "someone")
    assert (proven.signed_by, proven.witnesses) == ((LOG.vkey,), {SEER.vkey: 1_700_000_000})


def test_without_an_opening_nobody_is_named() -> None:
    proven = read(make(opening=None).text())
    assert (proven.identity, proven.customer_id) == ("not opened", None)
    proven = read(make(opening=None, erasure="proven").text())
    assert (proven.identity, proven.customer_id) == ("identity erased", None)


def test_several_keys_and_unknown_signatures() -> None:
    new = other_key(ORIGIN)
    made = make()
    made.signatures = other_key("someone.else").line(made.body) + new.line(made.body) + made.signatures
    assert read(made.text()).signed_by == (LOG.vkey,)
    assert verify_receipt(made.text(), [new.vkey]).signed_by == (new.vkey,)
    assert verify_receipt(made.text(), [new.vkey, LOG.vkey]).signed_by == (new.vkey, LOG.vkey)
    made.signatures += LOG.line(made.body)
    assert read(made.text()).signed_by == (LOG.vkey,), "a key counts once"
    assert verify_receipt(made.text(), [LOG.vkey]).witnesses == {}


# What is refused, although the signatures are good.

FIVE = hashlib.sha256(b"render-platform/customer/v1\n" + bytes(32) + b"5").hexdigest()
SIGNED: dict[str, Callable[[], Made]] = {
    "entry of another type": lambda: make(entry={"type": "watermark"}),
    "entry of another version": lambda: make(entry={"version": 2}),
    "entry without a root": lambda: make(entry={"merkle_root": None}),
    "entry with another root": lambda: make(entry={"merkle_root": "00" * 32}),
    "entry of fewer rows": lambda: make(entry={"records": 4}),
    "entry of more rows": lambda: make(rows=4, entry={"records": 7}),
    "entry of no rows": lambda: make(entry={"records": 0}),
    "entry of half a row": lambda: make(entry={"records": "5"}),
    "entry without a batch": lambda: make(entry={"batch_id": 5}),
    "event of another version": lambda: make(event={"schema_version": 2}),
    "event with an object": lambda: make(event={"model": {}}),
    "event with NUL": lambda: make(event={"model": "\\\0"}),
    "opening of another": lambda: make(opening={"customer_id": "someone else", "salt": "00" * 32}),
    "opening with another salt": lambda: make(opening={"customer_id": "someone", "salt": "01" * 32}),
    "opening with a short salt": lambda: make(opening={"customer_id": "0someone", "salt": "00" * 31}),
    "opening of a number": lambda: make(event={"customer_ref": FIVE}, opening={"customer_id": 5, "salt": "00" * 32}),
    "opening with more": lambda: make(opening={"customer_id": "someone", "salt": "00" * 32, "issuer": "key"}),
    "opening and erasure": lambda: make(erasure="proven"),
    "erasure without proof": lambda: make(opening=None, erasure={}),
    "erasure of another": lambda: make(opening=None, erasure="proven", event={"customer_ref": "00" * 32}),
    "event_index of a boolean": lambda: make(at=1, event_index=True),
    "version of a boolean": lambda: make(version=True),
    "negative event_index": lambda: make(event_index=-3),
    "proof of no list": lambda: make(event_proof=None),
    "proof with a number": lambda: make(event_proof=[5]),
    "proof too long": lambda: make(event_proof=["00" * 32] * 70),
    "another version of receipts": lambda: make(version=2),
    "another field": lambda: make(note="hello"),
    "entry as an object": lambda: make(event={"a": 1}, entry={"records": [1]}),
}


@pytest.mark.parametrize("case", SIGNED)
def test_what_is_signed_is_still_checked(case: str) -> None:
    with pytest.raises(InvalidReceipt):
        read(SIGNED[case]().text())


def test_an_erasure_needs_its_proof() -> None:
    made = make(opening=None, erasure="proven")
    for name, value in (("index", 0), ("proof", []), ("entry", made.extra["entry"])):
        changed = make(opening=None, erasure="proven")
        changed.extra["erasure"][name] = value
        with pytest.raises(InvalidReceipt):
            read(changed.text())


# Signatures.


def test_a_known_key_with_a_bad_signature_refuses_all() -> None:
    made = make()
    for key, vkeys in ((LOG, ([LOG.vkey], [])), (SEER, ([LOG.vkey], [SEER.vkey]))):
        bad = f"— {key.name} {encoded(key.key_id + bytes(72 if key.kind == 4 else 64))}\n"
        for signatures in (bad + made.signatures, made.signatures + bad):
            with pytest.raises(InvalidReceipt, match="wrong"):
                verify_receipt(Made(made.extra, made.index, made.proof, made.body, signatures).text(), *vkeys)


def test_a_cosignature_is_of_its_time_and_of_a_witness() -> None:
    made = make()
    line = SEER.line(made.body, 5).split(" ")[2]
    data = bytearray(base64.b64decode(line))
    data[11] ^= 1
    made.signatures = LOG.line(made.body) + f"— {SEER.name} {encoded(bytes(data))}\n"
    with pytest.raises(InvalidReceipt, match="wrong"):
        read(made.text())
    made.signatures = LOG.line(made.body) + SEER.line(made.body, 2**63)
    with pytest.raises(InvalidReceipt, match="time"):
        read(made.text())


def test_keys_do_not_stand_for_each_other() -> None:
    made = make()
    with pytest.raises(InvalidReceipt, match="not signed"):
        verify_receipt(made.text(), [other_key(ORIGIN).vkey])
    with pytest.raises(InvalidReceipt, match="not signed"):
        verify_receipt(made.text(), [])
    foreign = other_key("another.log")
    made.signatures += foreign.line(made.body)
    with pytest.raises(InvalidReceipt, match="not signed"):  # a trusted key of another log says nothing of this one
        verify_receipt(made.text(), [foreign.vkey])
    for keys in (([SEER.vkey], []), ([LOG.vkey], [LOG.vkey])):
        with pytest.raises(InvalidKey):
            verify_receipt(made.text(), *keys)


@pytest.mark.parametrize(
    "vkey", ["", "x", "a+b+c", VKEY[:-1], VKEY + "=", VKEY.replace("4cdb", "4cdc"), " " + VKEY, "\ud800" + VKEY, "é+++"]
)
def test_a_malformed_key_is_named_as_such(vkey: str) -> None:
    with pytest.raises(InvalidKey):
        verify_receipt(GOOD, [vkey])


# Mutations.


def check_mutation(text: str | bytes) -> None:
    """It proves nothing, or the same as before; a signature that is not known any more may be missing."""
    try:
        found = verify_receipt(text, [VKEY], [WITNESS])
    except InvalidReceipt:
        return
    expected = verify_receipt(GOOD, [VKEY], [WITNESS])
    assert found._replace(witnesses=expected.witnesses) == expected
    assert found.witnesses.items() <= expected.witnesses.items()
    assert (text if isinstance(text, str) else text.decode()).split("\n\n— ")[0] == GOOD.split("\n\n— ")[0]


def mutated(data: bytes, seed: int, kind: str) -> bytes:
    rng = random.Random(seed)
    one, two = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return {
        "flip": data[:one] + bytes([data[one % len(data)] ^ (1 << rng.randrange(8))]) + data[one + 1 :],
        "insert": data[:one] + rng.choice((b"\n", b" ", b"\r", b"=", b"\0", b"+", rng.randbytes(3))) + data[one:],
        "delete": data[:one] + data[one + rng.randrange(1, 5) :],
        "cut": data[:one],
        "repeat": data[:two] + data[one:two] + data[two:],
        "remove": data[:one] + data[two:],
        "case": data[:one] + data[one:two].swapcase() + data[two:],
    }[kind]


KINDS = st.sampled_from(["flip", "insert", "delete", "cut", "repeat", "remove", "case"])


@settings(max_examples=1_500)
@given(seed=st.integers(0, 2**32), kind=KINDS)
def test_a_mutated_receipt_proves_nothing_else(seed: int, kind: str) -> None:
    check_mutation(mutated(GOOD.encode(), seed, kind))


@settings(max_examples=1_500)
@given(seed=st.integers(0, 2**32), kind=KINDS)
def test_mutated_extra_data_proves_nothing_else(seed: int, kind: str) -> None:
    lines = GOOD.split("\n")
    extra = mutated(base64.b64decode(lines[1].split(" ")[1]), seed, kind)
    check_mutation("\n".join([lines[0], f"extra {encoded(extra)}", *lines[2:]]))


@settings(max_examples=300)
@given(st.data())
def test_lines_moved_or_dropped_prove_nothing_else(data: st.DataObject) -> None:
    lines = GOOD.split("\n")
    chosen = data.draw(st.lists(st.sampled_from(lines), max_size=len(lines) + 2) | st.permutations(lines))
    check_mutation("\n".join(chosen))


@given(st.binary(max_size=300) | st.text(max_size=300))
def test_anything_else_is_refused_as_such(data: bytes | str) -> None:
    with pytest.raises(InvalidReceipt):
        verify_receipt(data, [VKEY])


@pytest.mark.parametrize(
    "text",
    [
        GOOD + "\n",
        GOOD[:-1],
        " " + GOOD,
        "\ufeff" + GOOD,
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("extra ", "extra  "),
        GOOD.replace("index 1\n", "index 01\n"),
        GOOD.replace("index 1\n", "index +1\n"),
        GOOD.replace("index 1\n", "index １\n"),
        GOOD.replace("index 1\n", "index 1\nindex 1\n"),
        GOOD.replace("\n7\n", "\n07\n"),
        GOOD.replace("— ", "- "),
        GOOD.replace("\n\n— ", "\nextension\n\n— "),
        GOOD.replace("\n\n— ", "\nmore\n— "),
        GOOD.partition("— ")[0],
        GOOD + "— x AAAAAAA=\n" * 100,
        GOOD + "— x AAAAAA==\n",
        GOOD + "— x+y AAAAAAA=\n",
        GOOD + "— x\x01y AAAAAAA=\n",
        GOOD + f"— x {'A' * MAX_RECEIPT_BYTES}\n",
        GOOD.replace(GOOD.split()[2], encoded(EXTRA.replace(b":1,", b":1.0,", 1))),
        "x" * MAX_RECEIPT_BYTES + "\n",
        "\ud800",
    ],
    ids=range(23),
)
def test_only_the_exact_text_is_a_receipt(text: str) -> None:
    with pytest.raises(InvalidReceipt):
        verify_receipt(text, [VKEY], [WITNESS])


# As a program.


def run(*arguments: object, cwd: Path, module: bool = False) -> subprocess.CompletedProcess[str]:
    program = ["-m", "render_platform.receipt_verifier"] if module else ["-I", "receipt_verifier.py"]
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A folder with the one file and a receipt."""
    shutil.copy(MODULE, tmp_path / "receipt_verifier.py")
    (tmp_path / "receipt").write_text(GOOD)
    return tmp_path


def test_the_file_runs_alone(alone: Path) -> None:
    done = run("receipt", "--key", VKEY, cwd=alone)
    assert (done.returncode, done.stderr) == (0, "")
    assert '"acme-studio"' in done.stdout
    assert "unwitnessed" in done.stdout
    assert '"batch"' not in done.stdout
    done = run("receipt", "--key", VKEY, "--witness", WITNESS, "--json", cwd=alone)
    assert json.loads(done.stdout) == {"verified": True, "witnessed": True, **VECTOR["proven"]}
    done = run("receipt", "--key", VKEY, "--witness", WITNESS, cwd=alone, module=True)
    assert done.returncode == 0, done.stderr
    assert "2023-11-17T00:13:20+00:00" in done.stdout
    assert "unwitnessed" not in done.stdout


def test_exit_codes(alone: Path) -> None:
    (alone / "bad").write_text(GOOD.replace("\n7\n", "\n8\n"))
    for arguments, code in (
        (("bad", "--key", VKEY), 1),
        (("receipt", "--key", LOG.vkey), 1),
        (("receipt",), 2),
        (("absent", "--key", VKEY), 2),
        (("receipt", "--key", "x"), 2),
        (("receipt", "--key", VKEY, "--witness", VKEY), 2),
    ):
        done = run(*arguments, cwd=alone)
        assert (done.returncode, done.stdout) == (code, ""), arguments
        assert done.stderr
        assert "Traceback" not in done.stderr


def test_it_depends_on_the_standard_library_and_cryptography_alone() -> None:
    source = MODULE.read_text()
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    assert names - sys.stdlib_module_names == {"cryptography"}
    assert len(source.splitlines()) <= 300
