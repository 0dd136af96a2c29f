"""Whole stories of evidence, told by commands alone: rotations, a witness, recovery, and evidence in a bucket."""

from __future__ import annotations

import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from render_platform.config import load_settings
from render_platform.events import UsageEvent
from render_platform.note import load_key, load_or_create_key
from render_platform.pipeline import open_platform
from tests.commands import PROGRAM, clean_environment, run_command, run_inside, trace_rows, write_trace
from tests.conformance import s3_server
from tests.stories import signer
from tests.test_cli import error_of, vkeys
from tests.test_evidence_commands import good, grow, refused
from tests.test_recovery import backup, restore

Env = dict[str, str]
RECOVERY = "example.com/recovery"


def pins(*keys: str) -> list[str]:
    return [word for key in keys for word in ("--key", key)]


def published(state: Path) -> tuple[int, int]:
    """The size that stands, and how many lines sign it."""
    lines = (state / "log" / "checkpoint").read_text().splitlines()
    return int(lines[1]), len(lines) - 4


def flushed(state: Path, count: int = 1, env: Env | None = None) -> list[UsageEvent]:
    """`count` events more, published: one entry, where no hour ends meanwhile."""
    events = grow(state, count)
    good("flush", "--state", state, env=env)
    return events


# 1. Rotation.


@pytest.fixture
def recovery(tmp_path: Path) -> tuple[Path, Env]:
    """The offline key, and the settings that name it."""
    file = tmp_path / "elsewhere" / "recovery.key"
    vkey = good("rotation", "recovery-key", file, "--name", RECOVERY).stdout.strip()
    assert good("rotation", "recovery-key", file, "--name", RECOVERY).stdout.strip() == vkey, "it is made once"
    return file, {"RENDER_PLATFORM_RECOVERY_KEY": vkey}


def rotate(state: Path, role: str, recovery: tuple[Path, Env], overlap: int) -> int:
    """Draft here, sign on the other machine, finish here; gives the entry's index."""
    file, env = recovery
    draft, signed = state / f"{role}.draft", state / f"{role}.signed"
    draft.write_text(good("rotation", "draft", role, "--overlap", overlap, "--state", state, env=env).stdout)
    signed.write_text(good("rotation", "sign", draft, "--key", file).stdout)
    index = int(good("rotation", "finish", signed, "--state", state, "--json", env=env).json["entry_index"])
    again = good("rotation", "finish", signed, "--state", state, env=env).stdout
    assert f"rotated; entry {index} of the log says so" in again, "finishing twice is finishing once"
    return index


@pytest.mark.parametrize("overlap", [0, 3])
def test_rotating_the_logs_key(tmp_path: Path, recovery: tuple[Path, Env], overlap: int) -> None:
    state, env = tmp_path / "state", recovery[1]
    before = flushed(state)[0]
    old, attestation = vkeys(state)
    old_receipt = receipt(state, before, tmp_path / "old")
    assert rotate(state, "checkpoint", recovery, overlap) == 1
    new = vkeys(state)[0]
    assert new != old
    assert published(state) == (2, 2 if overlap else 1), "what stands is signed by who may sign it"
    after = flushed(state, env=env)[0]
    for keys in ([old], [new], [old, new]):
        told = good("verify", "--deep", "--state", state, *pins(*keys, attestation), "--json", env=env).json
        assert (told["entries"], told["problems"]) == (3, [])
        assert not any("recovery" in note for note in told["notes"])
    loose = good("verify", "--state", state, *pins(old, attestation), "--json").json["notes"]
    assert any("recovery key is not pinned" in note for note in loose)
    assert any(
        "recovery key is not pinned" in note for note in good("verify", "--state", state, "--json").json["notes"]
    )
    own = good("verify", "--state", state, "--json", env=env).json["notes"]
    assert not any("recovery key is not pinned" in note for note in own)
    foreign = {"RENDER_PLATFORM_RECOVERY_KEY": signer(RECOVERY, 9).verifier.vkey}
    for words in ([], pins(old, attestation)):
        told = run_inside("verify", "--state", state, *words, env=foreign)
        what = "entry 1: the rotation is not signed by the recovery key"
        if words and not overlap:  # who pinned the old key knows no other one then
            what = "log/checkpoint: note: no known key has signed it"
        assert (told.code, what in told.stdout) == (1, True)
    new_receipt = receipt(state, after, tmp_path / "new")
    codes = [run_inside("verify-receipt", file, "--key", key).code
             for file in (old_receipt, new_receipt) for key in (old, new)]  # fmt: skip
    assert codes == [0, 1, 0 if overlap else 1, 0]
    for _ in range(3):
        flushed(state)
    assert published(state) == (6, 1)
    assert sorted(path.name for path in (state / "keys").iterdir()) == ["attestation.key", "checkpoint.key"]
    good("verify", "--deep", "--state", state, *pins(old, attestation), env=env)


def receipt(state: Path, event: UsageEvent, file: Path, env: Env | None = None) -> Path:
    file.write_text(good("receipt", event.event_id, "--state", state, env=env).stdout)
    return file


@pytest.mark.parametrize("overlap", [0, 3])
def test_rotating_the_attestations_key(tmp_path: Path, recovery: tuple[Path, Env], overlap: int) -> None:
    """What was stored under the old key, and not logged yet, is logged before the rotation."""
    state, env = tmp_path / "state", recovery[1]
    flushed(state)
    grow(state, 2)
    with open_platform(load_settings(environ={}, state_dir=state)) as platform:
        platform.seal()
        platform.store()
    log, old = vkeys(state)
    assert rotate(state, "attestation", recovery, overlap) == 2
    new = vkeys(state)[1]
    assert (vkeys(state)[0], new != old) == (log, True)
    flushed(state, env=env)
    for keys in ([old], [new], [old, new]):
        good("verify", "--deep", "--state", state, *pins(log, *keys), env=env)
    good("verify", "--state", state)
    hours = ("--from", "2020-01-01T00:00Z", "--to", "2029-12-01T00:00Z", "-o", tmp_path / "b.tar")
    assert run_inside("bundle", "--state", state, *hours).code == 3, "batches of both keys, and hours that are open"
    assert run_inside("verify-bundle", tmp_path / "b.tar", *pins(log, old, new)).code == 3
    assert run_inside("verify-bundle", tmp_path / "b.tar", *pins(log, new)).code == 1


def test_rotating_a_gateways_key(tmp_path: Path, recovery: tuple[Path, Env]) -> None:
    """A gateway reads its key when it starts: the file is in its place by then."""
    state = tmp_path / "state"
    flushed(state)
    assert "gateway.key is not there" in refused("rotation", "draft", "gateway", "--state", state, env=recovery[1])
    load_or_create_key(state / "keys" / "gateway.key", "example.com/gateway")
    old = good("vkey", "--gateway", "--state", state).stdout
    rotate(state, "gateway", recovery, 0)
    assert good("vkey", "--gateway", "--state", state).stdout != old
    good("verify", "--deep", "--state", state, env=recovery[1])


def test_a_rotation_in_the_wrong_order_or_place(tmp_path: Path, recovery: tuple[Path, Env]) -> None:
    """Whatever is given, the log goes on under its key: a rotation that nobody here could follow would end it."""
    (key, env), state, other = recovery, tmp_path / "state", tmp_path / "other"
    for folder in (state, other):
        flushed(folder)
    draft, signed, foreign = (tmp_path / name for name in ("draft", "signed", "foreign"))
    assert "recovery_key is not set" in refused("rotation", "draft", "checkpoint", "--state", state)
    external = {**env, "RENDER_PLATFORM_CHECKPOINT_SIGNER": f"file:{state / 'keys' / 'checkpoint.key'}"}
    assert "checkpoint_signer is set" in refused("rotation", "draft", "checkpoint", "--state", state, env=external)
    assert "no platform state" in refused("rotation", "draft", "checkpoint", "--state", tmp_path / "no", env=env)
    draft.write_text(good("rotation", "draft", "checkpoint", "--state", state, env=env).stdout)
    foreign.write_text(good("rotation", "draft", "checkpoint", "--state", other, env=env).stdout)
    for file in (draft, foreign):
        signed_file = signed if file == draft else foreign
        signed_file.write_text(good("rotation", "sign", file, "--key", key).stdout)
    assert "not signed" in refused("rotation", "finish", draft, "--state", state, env=env)
    assert "not signed" in refused("rotation", "sign", signed, "--key", key)
    assert "key that is here" in refused("rotation", "finish", foreign, "--state", state, env=env)
    for damage in (b"\xff\xfe", b"", b"x" * 100_000):
        (tmp_path / "bad").write_bytes(damage)
        assert "no rotation" in refused("rotation", "finish", tmp_path / "bad", "--state", state, env=env)
        assert "no rotation" in refused("rotation", "sign", tmp_path / "bad", "--key", key)
        assert "not an Ed25519 key" in refused("rotation", "sign", draft, "--key", chmod(tmp_path / "bad"))
    assert "is not there" in refused("rotation", "sign", draft, "--key", tmp_path / "none")
    assert "holds a key of the name" in refused("rotation", "recovery-key", key, "--name", "example.com/other")
    assert "not a key name" in refused("rotation", "recovery-key", tmp_path / "new.key", "--name", "two words")
    coming = state / "keys" / "checkpoint.key.next"
    coming.rename(tmp_path / "moved")
    assert "key that is here" in refused("rotation", "finish", signed, "--state", state, env=env)
    flushed(state)
    (tmp_path / "moved").rename(coming)
    assert good("rotation", "finish", signed, "--state", state, "--json", env=env).json == {"entry_index": 2}
    again = refused("rotation", "draft", "checkpoint", "--state", state, env=env)
    assert "still in its overlap" in again
    good("verify", "--state", state, env=env)


def chmod(path: Path) -> Path:
    path.chmod(0o600)
    return path


# 2. A witness.


@contextmanager
def running_witness(folder: Path, *logs: str) -> Iterator[str]:
    """The process that `render-platform witness` is; gives its URL."""
    command = [*PROGRAM, "witness", "--folder", str(folder), *(word for log in logs for word in ("--log", log))]
    process = subprocess.Popen(
        command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        first = process.stdout.readline() if process.stdout else ""
        assert first.startswith("witness: http://127.0.0.1:"), process.communicate(timeout=30)
        yield first.split()[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate(timeout=30)


def test_a_witness_of_a_log(tmp_path: Path) -> None:
    state, folder = tmp_path / "state", tmp_path / "witness"
    flushed(state)
    log, attestation = vkeys(state)
    vkey = good("witness", "--folder", folder, "--init", "example.com/w").stdout.strip()
    assert "there is a witness in this folder" in refused("witness", "--folder", folder, "--init", "example.com/w")
    assert "no --log" in refused("witness", "--folder", folder)
    assert "no witness here" in refused("witness", "--folder", tmp_path / "none", "--log", log)
    assert "not an Ed25519 verifier key" in refused("witness", "--folder", folder, "--log", vkey)
    asked = {"RENDER_PLATFORM_WITNESS_POLICY": "hold", "RENDER_PLATFORM_WITNESS_QUORUM": "1"}
    pinned = ("verify", "--state", state, *pins(log, attestation), "--witness", vkey)
    with running_witness(folder, log) as url:
        asked["RENDER_PLATFORM_WITNESSES"] = f"{url} {vkey}"
        event = flushed(state, env=asked)[0]
        told = good(*pinned, "--json").json
        assert (told["entries"], [note for note in told["notes"] if "unwitnessed" in note]) == (2, [])
        told = run_inside("witness", "--folder", folder, "--log", log)
        assert (told.code, "runs already" in error_of(told)) == (3, True)
    file = receipt(state, event, tmp_path / "receipt")
    found = good("verify-receipt", file, "--key", log, "--witness", vkey, "--json").json
    assert (found["witnessed"], list(found["witnesses"])) == (True, [vkey])
    before = (state / "log" / "checkpoint").read_bytes()
    grow(state, 1)
    assert "0 of 1 witnesses cosigned" in refused("flush", "--state", state, env=asked, code=3)
    assert (state / "log" / "checkpoint").read_bytes() == before, "held back"
    good(*pinned)
    publishing = {**asked, "RENDER_PLATFORM_WITNESS_POLICY": "publish"}
    good("flush", "--state", state, env=publishing)
    assert run_inside(*pinned).code == 1, "published, and not cosigned"
    with running_witness(folder, log) as url:
        asked["RENDER_PLATFORM_WITNESSES"] = f"{url} {vkey}"
        good("flush", "--state", state, env=asked)
        good(*pinned)
    assert "not a witness's URL" in refused("flush", "--state", state, env={"RENDER_PLATFORM_WITNESSES": "nonsense"})


def test_a_key_that_was_stolen_before_its_rotation(tmp_path: Path, recovery: tuple[Path, Env]) -> None:
    """The thief signs another log of the size that the old key may sign for good. The pinned witness did not."""
    state, folder = tmp_path / "state", tmp_path / "witness"
    flushed(state)
    old, attestation = vkeys(state)
    thief = tmp_path / "thief"
    shutil.copytree(state, thief)
    stolen = load_key(state / "keys" / "checkpoint.key")
    vkey = good("witness", "--folder", folder, "--init", "example.com/w").stdout.strip()
    for folder_of, count in ((state, 2), (thief, 3)):
        grow(folder_of, count)
    with running_witness(folder, old) as url:
        env = {**recovery[1], "RENDER_PLATFORM_WITNESSES": f"{url} {vkey}"}
        good("flush", "--state", state, env=env)
        good("flush", "--state", thief)
        assert published(state)[0] == published(thief)[0] == 2
        assert "another history" in refused("flush", "--state", thief, env=env, code=3)
    rotate(state, "checkpoint", recovery, 0)
    new = vkeys(state)[0]
    with running_witness(folder, old, new) as url:
        env["RENDER_PLATFORM_WITNESSES"] = f"{url} {vkey}"
        flushed(state, env=env)
    checked = (*pins(old, attestation), "--witness", vkey)
    good("verify", "--state", state, *checked, env=recovery[1])
    assert load_key(thief / "keys" / "checkpoint.key").verifier == stolen.verifier
    good("verify", "--state", thief, *pins(old, attestation))
    found = run_inside("verify", "--state", thief, *checked)
    assert (found.code, "0 of 1 pinned witnesses have cosigned it" in found.stdout) == (1, True)


# 3. A database that was restored from a backup.


def check_recovered(state: Path, size: int, env: Env) -> dict[str, Any]:
    """The database is `size` entries old: everything stops, `recover` brings it up, and everything goes on."""
    grown = published(state)[0]
    restore(state)
    stopped = run_inside("flush", "--state", state, env=env)
    assert stopped.code == 3
    assert "older copy" in error_of(stopped)
    assert "run `render-platform recover`" in stopped.stderr
    for words in (["erase", "alice"], ["collect-orphans"]):
        assert "older copy" in refused(*words, "--state", state, env=env, code=3)
    told = good("recover", "--plan", "--state", state, env=env).stdout
    assert f"to replay: entries {size} to {grown - 1}\n" in told
    plan = good("recover", "--plan", "--state", state, "--json", env=env).json
    assert refused("flush", "--state", state, env=env, code=3), "a plan does nothing"
    done: dict[str, Any] = good("recover", "--state", state, "--json", env=env).json
    assert (done["size_before"], done["size"], done["entries"]) == (size, grown, plan["entries"])
    assert "nothing to recover" in good("recover", "--state", state, env=env).stdout
    assert good("flush", "--state", state, "--json", env=env).json["tree_size"] >= grown
    good("verify", "--deep", "--state", state, env=env)
    return done


def test_a_database_that_was_restored(tmp_path: Path) -> None:
    """In processes of their own where ClickHouse is opened: one process has one embedded folder."""
    state, trace = tmp_path / "state", write_trace(tmp_path / "trace.csv", trace_rows(30))
    assert run_command("demo", "--state", state).code == 0
    backup(state)
    size = published(state)[0]
    assert run_command("demo", "--state", state, "--trace", trace).code == 0
    done = check_recovered(state, size, {})
    assert (done["events_restored"], done["entries"]["usage_batch"]) == (30, 1)
    drilled = run_command("restore-drill", tmp_path / "drill", "--state", state)
    assert drilled.code == 0, drilled.said
    assert drilled.stdout == f"rebuilt {published(state)[0]} entries in {tmp_path / 'drill'}: equal\n"


@pytest.mark.parametrize("overlap", [0, 3])
def test_a_database_from_before_a_rotation(tmp_path: Path, recovery: tuple[Path, Env], overlap: int) -> None:
    """The key files are those of now: the log is signed by a key that the restored database does not know of."""
    state, env = tmp_path / "state", recovery[1]
    flushed(state, 2)
    backup(state)
    rotate(state, "checkpoint", recovery, overlap)
    flushed(state, 3, env=env)
    assert check_recovered(state, 1, env)["entries"] == {"key": 1, "usage_batch": 1}
    for _ in range(3):
        flushed(state, env=env)
    assert sorted(path.name for path in (state / "keys").iterdir()) == ["attestation.key", "checkpoint.key"]


def test_a_backup_from_between_draft_and_finish(tmp_path: Path, recovery: tuple[Path, Env]) -> None:
    """Database and keys were both restored: the key in force stands there as the one that is to come."""
    (key, env), state = recovery, tmp_path / "state"
    flushed(state)
    backup(state)
    draft, signed = tmp_path / "draft", tmp_path / "signed"
    draft.write_text(good("rotation", "draft", "checkpoint", "--overlap", 0, "--state", state, env=env).stdout)
    shutil.copytree(state / "keys", tmp_path / "keys")
    signed.write_text(good("rotation", "sign", draft, "--key", key).stdout)
    good("rotation", "finish", signed, "--state", state, env=env)
    flushed(state)
    restore(state)
    shutil.rmtree(state / "keys")
    shutil.copytree(tmp_path / "keys", state / "keys")
    assert run_inside("flush", "--state", state, env=env).code in (1, 3)
    assert "replayed: entries 1 to 2" in good("recover", "--state", state, env=env).stdout
    flushed(state, env=env)
    good("verify", "--deep", "--state", state, env=env)


# 6. Evidence in a bucket.


def test_evidence_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state folder keeps database and keys; an auditor needs the bucket and the keys alone."""
    s3_server.use_credentials(monkeypatch)
    state, where = tmp_path / "state", f"s3://plain/{uuid.uuid4().hex}"
    options = {"objects_url": where, "objects_endpoint": s3_server.seaweed().endpoint}
    env = {f"RENDER_PLATFORM_{name.upper()}": value for name, value in options.items()}
    event = grow(state, 3, **options)[0]
    assert "1 entries added; the log holds 1" in good("flush", "--state", state, env=env).stdout
    assert not (state / "log").exists()
    backup(state)
    log, attestation = (
        good("vkey", *more, "--state", state, env=env).stdout.strip() for more in ([], ["--attestation"])
    )
    grow(state, 4, **options)
    good("flush", "--state", state, env=env)
    nowhere, kept = tmp_path / "auditor", tmp_path / "kept"
    audit = ("verify", "--deep", "--state", nowhere, *pins(log, attestation), "--remember", kept, "--json")
    told = good(*audit, env=env).json
    assert (told["entries"], told["events"], told["rows_read"]) == (2, 7, 7)
    assert not nowhere.exists()
    file = receipt(state, event, tmp_path / "receipt", env)
    assert good("verify-receipt", file, "--key", log, "--json").json["tree_size"] == 2
    hours = ("--from", "2020-01-01T00:00Z", "--to", "2029-12-01T00:00Z", "-o", tmp_path / "b.tar")
    assert run_inside("bundle", "--state", state, *hours, env=env).code == 3
    assert run_inside("verify-bundle", tmp_path / "b.tar", *pins(log, attestation)).code == 3, "offline, and no bucket"
    restore(state)
    assert "older copy" in refused("flush", "--state", state, env=env, code=3)
    assert "replayed: entries 1 to 1" in good("recover", "--state", state, env=env).stdout
    assert "0 entries added; the log holds 2" in good("flush", "--state", state, env=env).stdout
    good("verify", "--deep", "--state", state, env=env)
    assert "1 orphan" not in good("collect-orphans", "--plan", "--state", state, env=env).stdout
    empty = {**env, "RENDER_PLATFORM_OBJECTS_URL": f"s3://plain/{uuid.uuid4().hex}"}
    assert run_inside(*audit, env=empty).code == 1, "an empty bucket is no evidence"
    down = {**env, "RENDER_PLATFORM_OBJECTS_ENDPOINT": "http://127.0.0.1:9"}
    for words in (["flush", "--state", state], audit):
        outcome = run_inside(*words, env=down)
        assert (outcome.code, s3_server.SECRET in outcome.said) == (3, False), outcome.said
