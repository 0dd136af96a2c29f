"""The commands for evidence, each as its user calls it: what it prints, its `--json`, its exit codes, its bad input."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from render_platform.clock import HOUR_US, hour_of, iso
from render_platform.config import load_settings
from render_platform.console import remember, remembered
from render_platform.errors import UsageError
from render_platform.events import UsageEvent
from render_platform.note import Checkpoint, WitnessKey, cosignature_line, sign_note
from render_platform.pipeline import Platform, open_platform
from tests.bundles import pack
from tests.commands import CHECKOUT, Finished, Outcome, finished_demo, run_command, run_inside
from tests.factories import make_events
from tests.stories import signer
from tests.test_cli import error_of, flip, vkeys
from tests.test_witness import WITNESS

SEEDS = itertools.count(1)
CUSTOMER = "alice"
DAY_S = 86_400


def record_live(platform: Platform, count: int) -> list[UsageEvent]:
    """`count` events of the customer alice, recorded now, in the lane that never ends."""
    with platform.database.write() as connection:
        ref = platform.outbox.customer_ref(connection, "key", CUSTOMER)
        made = make_events(count, next(SEEDS), platform.clock.now_us(), 1)
        return platform.outbox.record(connection, "live", [replace(event, customer_ref=ref) for event in made])


def grow(state: Path, count: int, **options: Any) -> list[UsageEvent]:
    """`record_live` in a state folder that may be new; nothing is sealed or published."""
    with open_platform(load_settings(environ={}, state_dir=state, **options), create=True) as platform:
        return record_live(platform, count)


def good(*words: object, env: dict[str, str] | None = None) -> Outcome:
    outcome = run_inside(*words, env=env)
    assert outcome.code == 0, outcome.said
    return outcome


def refused(*words: object, code: int = 2, env: dict[str, str] | None = None) -> str:
    """The one error, with its remedy; nothing on stdout."""
    outcome = run_inside(*words, env=env)
    assert (outcome.code, outcome.stdout) == (code, ""), outcome.said
    return error_of(outcome)


def wrong_words(*words: object) -> None:
    """What the parser itself refuses."""
    outcome = run_inside(*words)
    assert (outcome.code, outcome.stdout) == (2, ""), outcome.said
    assert "Usage: render-platform" in outcome.stderr


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[UsageEvent]]:
    """Two published batches, of seven events of one customer."""
    state = tmp_path_factory.mktemp("live") / "state"
    events = []
    for count in (3, 4):
        events += grow(state, count)
        good("flush", "--state", state)
    return state, events


@pytest.fixture
def state(live: tuple[Path, list[UsageEvent]], tmp_path: Path) -> Path:
    """A copy, to change."""
    shutil.copytree(live[0], tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture
def event_id(live: tuple[Path, list[UsageEvent]]) -> uuid.UUID:
    return live[1][2].event_id


@pytest.fixture(scope="module")
def demo() -> Finished:
    return finished_demo()


# verify.


def test_verify_with_a_witness(state: Path, tmp_path: Path) -> None:
    """Pinned witnesses that have not signed are a finding; words that cannot be kept are none."""
    key, vkey = vkeys(state)[0], run_inside("witness", "--folder", tmp_path / "w", "--init", "example.com/w")
    witness = ("--witness", vkey.stdout.strip())
    told = run_inside("verify", "--state", state, "--key", key, *witness)
    assert told.code == 1
    assert "0 of 1 pinned witnesses have cosigned it; 1 must" in told.stdout
    found = run_inside("verify", "--state", state, *witness, "--json")
    assert (found.code, found.json["verified"]) == (1, False)
    assert [one["where"] for one in found.json["problems"]] == ["log/checkpoint"]
    assert "--quorum is 2" in refused("verify", "--state", state, *witness, "--quorum", 2)
    assert "--quorum is 1" in refused("verify", "--state", state, "--quorum", 1)
    assert "witness" in refused("verify", "--state", state, "--witness", key), "a log's key is no witness's"
    wrong_words("verify", "--state", state, *witness, "--quorum", 0)


def test_a_witness_that_is_given_twice_counts_once(state: Path) -> None:
    path = state / "log" / "checkpoint"
    note = path.read_text()
    path.write_text(note + cosignature_line(note.partition("\n\n")[0] + "\n", WITNESS, 1_700_000_000))
    with open_platform(load_settings(environ={}, state_dir=state)) as platform:
        platform.log.publish()
    vkey = WitnessKey.of(WITNESS.name, WITNESS.verifier.public).vkey
    outcome = good("verify", "--state", state, "--witness", vkey, "--witness", vkey)
    assert "verified" in outcome.stdout


def test_what_verify_notes(state: Path) -> None:
    key, attestation = vkeys(state)
    own = good("verify", "--state", state, "--json").json["notes"]
    assert [note.startswith("the keys came from the state folder") for note in own] == [True]
    pinned = good("verify", "--state", state, "--key", key, "--key", attestation, "--json").json["notes"]
    assert [note.partition(":")[0] for note in pinned] == ["unwitnessed"]
    assert "--key is a log's key" in refused("verify", "--state", state, "--key", attestation)
    assert "not before" in refused("verify", "--state", state, "--from", "2026-01-01", "--to", "2026-01-01")


def test_verify_remembers(state: Path, tmp_path: Path) -> None:
    """What verified is kept, whole; a log that was cut back to less is found, and nothing is forgotten."""
    kept, pins = tmp_path / "kept", [word for key in vkeys(state) for word in ("--key", key)]
    command = ("verify", "--state", state, *pins, "--remember", kept)
    assert "unwitnessed" in good(*command).stdout
    assert kept.read_bytes() == (state / "log" / "checkpoint").read_bytes()
    shutil.copytree(state / "log", tmp_path / "older")
    grow(state, 2)
    good("flush", "--state", state)
    assert "unwitnessed" not in good(*command).stdout
    newest = kept.read_bytes()
    assert newest == (state / "log" / "checkpoint").read_bytes()
    shutil.rmtree(state / "log")
    shutil.copytree(tmp_path / "older", state / "log")
    cut = run_inside(*command, "--json")
    assert cut.code == 1
    assert "not consistent with the one published at size 3" in cut.json["problems"][0]["what"]
    assert kept.read_bytes() == newest, "what was remembered stays"
    assert good(*command[:-2], "--json").json["verified"], "without a memory nothing tells it apart"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("damage", [b"", b"nonsense\n", b"\xff\xfe", b"a\n1\n\n\n"], ids=repr)
def test_a_damaged_memory_is_an_error_and_stays(state: Path, tmp_path: Path, damage: bytes) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(damage)
    for words in (["verify", "--state", state], ["verify-bundle", kept, "--key", vkeys(state)[0]]):
        error = refused(*words, "--remember", kept)
        assert f"{kept} is no checkpoint that was remembered" in error
    assert kept.read_bytes() == damage


def test_a_memory_in_a_place_that_is_none(state: Path, tmp_path: Path) -> None:
    assert refused("verify", "--state", state, "--remember", tmp_path, code=3).startswith(f"error: {tmp_path}")
    nowhere = tmp_path / "no" / "kept"
    assert str(nowhere.parent) in refused("verify", "--state", state, "--remember", nowhere, code=3)


def noted(size: int) -> bytes:
    return sign_note(Checkpoint("log", size, bytes(32)).text(), [signer("log", 1)]).encode()


def test_a_larger_memory_is_not_replaced_by_a_smaller_one(tmp_path: Path) -> None:
    """Two that verify at once end in any order."""
    for size in (3, 9, 3):
        remember(tmp_path / "kept", noted(size))
    assert remembered(tmp_path / "kept").size == 9
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    (tmp_path / "kept").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="no checkpoint"):
        remember(tmp_path / "kept", noted(9))


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from render_platform.console import remember
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
try:
    remember(Path(sys.argv[1]), sys.stdin.buffer.read())
except OSError:
    sys.exit(7)
"""


def test_a_memory_that_cannot_be_written_whole_is_as_it_was(tmp_path: Path) -> None:
    remember(tmp_path / "kept", noted(3))
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "kept")]
    assert subprocess.run(command, input=noted(9), cwd=CHECKOUT, timeout=60).returncode == 7
    assert (tmp_path / "kept").read_bytes() == noted(3)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    os.link(tmp_path / "kept", tmp_path / "same file")
    remember(tmp_path / "kept", noted(9))
    assert (tmp_path / "same file").read_bytes() == noted(3), "never written in place"


# bundle and verify-bundle.


def whole_hour(demo: Finished) -> tuple[str, str]:
    start = demo.story["hours"][0]["hour"]
    return start, f"{start[:11]}{int(start[11:13]) + 1:02d}{start[13:]}"


def test_a_bundle_of_an_hour(demo: Finished, tmp_path: Path) -> None:
    start, end = whole_hour(demo)
    made = good("bundle", "--state", demo.state, "--from", start, "--to", end, "-o", tmp_path / "b.tar")
    assert made.stdout.splitlines()[-1] == "verified"
    again = good("bundle", "--state", demo.state, "--from", start, "--to", end, "-o", tmp_path / "c.tar", "--json")
    assert (again.json["verdict"], again.json["doubts"], again.json["problems"]) == ("verified", [], [])
    assert (tmp_path / "b.tar").read_bytes() == (tmp_path / "c.tar").read_bytes()
    pins = [word for key in vkeys(demo.state) for word in ("--key", key)]
    read = good("verify-bundle", tmp_path / "b.tar", *pins)
    assert f"hours {start} … {end}" in read.stdout
    assert good("verify-bundle", tmp_path / "b.tar", *pins, "--json").json["events"] == again.json["events"] > 0
    kept = tmp_path / "kept"
    good("verify", "--state", demo.state, *pins, "--remember", kept)
    good("verify-bundle", tmp_path / "b.tar", *pins, "--remember", kept)
    flip(tmp_path / "c.tar", 40_000)
    harmed = run_inside("verify-bundle", tmp_path / "c.tar", *pins)
    assert harmed.code == 1
    assert harmed.stdout.splitlines()[-1] == "not verified"
    assert run_inside("verify-bundle", tmp_path / "c.tar", *pins, "--json").json["verdict"] == "not_verified"
    strange = run_inside("verify-bundle", tmp_path / "b.tar", "--key", signer("example.com/log", 3).verifier.vkey)
    assert (strange.code, "no known key has signed it" in strange.stdout) == (1, True)


def test_a_bundle_of_an_hour_that_is_open(state: Path, tmp_path: Path) -> None:
    with open_platform(load_settings(environ={}, state_dir=state)) as platform:
        hour = hour_of(platform.clock.now_us())
    words = ("--from", iso(hour - HOUR_US), "--to", iso(hour + HOUR_US), "-o", tmp_path / "b.tar", "--whole-log")
    made = run_inside("bundle", "--state", state, *words)
    assert (made.code, made.stdout.splitlines()[-1]) == (3, "indeterminate")
    assert "not provably complete" in made.stdout
    read = run_inside("verify-bundle", tmp_path / "b.tar", "--key", vkeys(state)[0], "--json")
    assert (read.code, read.json["verdict"], read.json["problems"]) == (3, "indeterminate", [])


def test_bundles_that_cannot_be(state: Path, tmp_path: Path) -> None:
    output = ("--state", state, "-o", tmp_path / "b.tar")
    for start, end in (("2026-01-01T10:30Z", "2026-01-01T11:00Z"), ("2026-01-01T11:00Z", "2026-01-01T10:00Z")):
        assert "not whole hours" in refused("bundle", *output, "--from", start, "--to", end)
    hours = ("--from", "2026-01-01T10:00Z", "--to", "2026-01-01T11:00Z")
    assert "nowhere" in refused("bundle", "--state", state, "-o", tmp_path / "nowhere" / "b.tar", *hours, code=3)
    wrong_words("bundle", *output, "--from", "2026-01-01T10:00Z")
    wrong_words("bundle", *output, "--from", "soon", "--to", "later")
    wrong_words("verify-bundle", tmp_path / "no.tar", "--key", vkeys(state)[0])
    wrong_words("verify-bundle", tmp_path, "--key", vkeys(state)[0])
    (tmp_path / "text").write_text("no archive")
    assert run_inside("verify-bundle", tmp_path / "text", "--key", vkeys(state)[0]).code == 1
    assert "log's" in refused("verify-bundle", tmp_path / "text")
    assert "not an Ed25519" in refused("verify-bundle", tmp_path / "text", "--key", "nonsense")


def test_what_a_bundle_says_cannot_speak_to_the_terminal(state: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.tar").write_bytes(pack({"[/red]\x1b]0;mine\x07": b"data"})[:514])
    told = run_inside("verify-bundle", tmp_path / "evil.tar", "--key", vkeys(state)[0])
    assert (told.code, "ends inside [/red]\\x1b]0;mine\\x07" in told.stdout) == (1, True)
    assert not {"\x1b", "\x07"} & set(told.said)


# Receipts and erasure.


def test_a_receipt(state: Path, event_id: uuid.UUID, tmp_path: Path) -> None:
    file = tmp_path / "receipt"
    file.write_text(good("receipt", event_id, "--state", state).stdout)
    key = ("--key", vkeys(state)[0])
    told = good("verify-receipt", file, *key)
    assert f'"{CUSTOMER}"' in told.stdout
    found = good("verify-receipt", file, *key, "--json").json
    assert (found["verified"], found["witnessed"], found["customer_id"]) == (True, False, CUSTOMER)
    assert found["event"]["event_id"] == str(event_id)
    strange = run_inside("verify-receipt", file, "--key", signer("example.com/log", 3).verifier.vkey)
    assert (strange.code, strange.stdout) == (1, "")
    file.write_text(file.read_text().replace("index 0", "index 1"))
    assert run_inside("verify-receipt", file, *key).code == 1


def test_receipts_that_cannot_be(state: Path, tmp_path: Path) -> None:
    assert "no event" in refused("receipt", uuid.UUID(int=7), "--state", state)
    waiting = grow(state, 1)[0].event_id
    assert "not under a published checkpoint yet" in refused("receipt", waiting, "--state", state, code=3)
    wrong_words("receipt", "seven", "--state", state)
    key = vkeys(state)[0]
    assert run_inside("verify-receipt", tmp_path / "none", "--key", key).code == 2
    (tmp_path / "text").write_bytes(b"\xff no receipt")
    assert run_inside("verify-receipt", tmp_path / "text", "--key", key).code == 1
    assert run_inside("verify-receipt", tmp_path / "text", "--key", "--json").code == 2
    wrong_words("verify-receipt", tmp_path / "text")


def test_erasing_a_customer(state: Path, event_id: uuid.UUID, tmp_path: Path) -> None:
    before, key = good("receipt", event_id, "--state", state).stdout, ("--key", vkeys(state)[0])
    assert "nothing is known" in good("erase", "bob", "--state", state).stdout
    assert good("erase", "bob", "--issuer", "idp", "--state", state, "--json").json["entry_index"] is None
    assert "entry 2 of the log says so" in good("erase", CUSTOMER, "--state", state).stdout
    assert "nothing is known" in good("erase", CUSTOMER, "--state", state).stdout
    for name, text, who in (
        ("old", before, "opened"),
        ("new", good("receipt", event_id, "--state", state).stdout, "identity erased"),
    ):
        (tmp_path / name).write_text(text)
        assert good("verify-receipt", tmp_path / name, *key, "--json").json["identity"] == who
    assert good("verify", "--deep", "--state", state).code == 0


# recover, restore-drill, collect-orphans.


def test_nothing_to_recover(state: Path) -> None:
    for words in (["recover"], ["recover", "--plan"]):
        assert "nothing to recover: the database holds all 2 entries" in good(*words, "--state", state).stdout
        found = good(*words, "--state", state, "--json").json
        assert (found["size_before"], found["size"], found["entries"]) == (2, 2, {})


def test_a_drill_has_something_to_rebuild_and_a_new_folder(tmp_path: Path) -> None:
    grow(tmp_path / "new", 1)
    assert "nothing is published yet" in refused("restore-drill", tmp_path / "drill", "--state", tmp_path / "new")
    assert not (tmp_path / "drill").exists()


def test_a_drill_finds_what_the_fast_path_lacks(state: Path, tmp_path: Path) -> None:
    """Nothing was sent to ClickHouse here: that is a difference, and exit 1. In a process of its own: it opens two."""
    told = run_command("restore-drill", tmp_path / "drill", "--state", state)
    assert told.code == 1, told.said
    assert "rebuilt 2 entries" in told.stdout
    assert ": DIFFERENT" in told.stdout
    again = run_command("restore-drill", tmp_path / "drill", "--state", state)
    assert (again.code, "cannot be made" in error_of(again)) == (2, True)
    grow(state, 2)
    found = run_command("restore-drill", tmp_path / "other", "--state", state, "--json")
    assert found.code == 1
    assert (found.json["equal"], list(found.json["waiting"].values())) == (False, [2])
    assert found.json["recovered"]["entries"] == {"usage_batch": 2}
    assert {one[0] for one in found.json["differences"]} == {"clickhouse"}


def test_collecting_orphans(state: Path) -> None:
    old, young = b"nobody names this", b"nor this"
    with open_platform(load_settings(environ={}, state_dir=state)) as platform:
        paths = [state / "blobs" / "sha256" / name[:2] / name[2:] for name in map(platform.cas.put, (old, young))]
    a_month_ago = paths[0].stat().st_mtime - 30 * DAY_S
    os.utime(paths[0], (a_month_ago, a_month_ago))
    planned = good("collect-orphans", "--plan", "--state", state)
    assert planned.stdout.splitlines()[0] == "1 orphan, 0 removed"
    assert paths[0].exists()
    assert good("collect-orphans", "--older-than-days", 60, "--state", state, "--json").json["orphans"] == []
    found = good("collect-orphans", "--state", state, "--json").json
    assert [one["size"] for one in found["removed"]] == [len(old)]
    assert (found["spared"], found["orphans"]) == ([], found["removed"])
    assert [path.exists() for path in paths] == [False, True]
    good("verify", "--deep", "--state", state)
    wrong_words("collect-orphans", "--older-than-days", 1, "--state", state)


# The state folder.


@pytest.mark.parametrize(
    "words",
    [
        *(["verify"], ["bundle", "--from", "2026-01-01", "--to", "2026-01-02", "-o", "b.tar"], ["collect-orphans"]),
        *(["receipt", str(uuid.UUID(int=1))], ["erase", "bob"], ["recover"], ["restore-drill", "drill"]),
    ],
    ids=lambda words: str(words[0]),
)
def test_a_folder_that_is_no_state(tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "holds no platform state" in refused(*words, "--state", tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == [], "nothing is made"


def test_a_setting_that_is_no_recovery_key(state: Path) -> None:
    env = {"RENDER_PLATFORM_RECOVERY_KEY": "nonsense"}
    for words in (["verify"], ["verify", "--key", vkeys(state)[0]], ["rotation", "draft", "checkpoint"]):
        assert "key" in refused(*words, "--state", state, env=env)
