"""Settings: defaults, then the environment, then options; and what is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from render_platform.config import Settings, load_settings
from render_platform.errors import UsageError

NAMES = [field.name for field in fields(Settings) if field.name != "catalogue"]
NUMBERS = [field.name for field in fields(Settings) if isinstance(field.default, int)]


def test_defaults(tmp_path: Path) -> None:
    settings = load_settings({}, state_dir=tmp_path)
    assert settings.batch_rows == 50_000
    assert settings.database_path == tmp_path / "platform.db"
    assert settings.clickhouse_url == f"chdb://{tmp_path / 'clickhouse'}"
    assert {path.parent for path in (settings.keys_dir, settings.blobs_dir, settings.log_dir)} == {tmp_path}


def test_options_go_before_the_environment_and_that_before_defaults() -> None:
    environ = {"RENDER_PLATFORM_BATCH_ROWS": "7", "RENDER_PLATFORM_BACKLOG_ROWS": "8", "PATH": "x"}
    settings = load_settings(environ, batch_rows=9, backlog_age_s=None)
    assert (settings.batch_rows, settings.backlog_rows, settings.backlog_age_s) == (9, 8, 20)


@pytest.mark.parametrize("field", NAMES)
def test_every_field_can_be_set_by_its_variable(field: str) -> None:
    variable = f"RENDER_PLATFORM_{field.upper()}"
    others = {"witness_policy": "hold", "repair_automatically": "1", "slow_path_engine": "clickhouse"}
    others |= {"database_url": "postgresql://h/n", "witness_quorum": "7"}
    value = others.get(field, "1024" if field in NUMBERS else "/some/text")
    assert str(getattr(load_settings({variable: value}), field)) == value


def test_the_environment_of_the_process_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().batch_rows == 50_000
    monkeypatch.setenv("RENDER_PLATFORM_BATCH_ROWS", "5")
    assert load_settings().batch_rows == 5
    assert load_settings({}).batch_rows == 50_000


def test_the_state_folder_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_settings({}).state_dir == tmp_path / "state"
    assert load_settings({"RENDER_PLATFORM_STATE_DIR": "~/x/../y"}).state_dir == Path("/home/someone/y")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("BATCH_ROW", "batch_rows"),
        ("BATCHROWS", "batch_rows"),
        ("STATE_DIR_", "state_dir"),
        ("", ""),
        ("CATALOGUE", ""),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_name(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"RENDER_PLATFORM_{name} is not a setting") as error:
        load_settings({f"RENDER_PLATFORM_{name}": "1"})
    assert error.value.remedy == f"did you mean {near}?" if near else "batch_rows" in error.value.remedy


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["", "x", "1.5", "1e3", "0x10", "5 rows"])
def test_what_is_no_number_is_refused(name: str, text: str) -> None:
    variable = f"RENDER_PLATFORM_{name.upper()}"
    with pytest.raises(UsageError, match=variable) as error:
        load_settings({variable: text})
    assert error.value.exit_code == 2


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, 10**12])
def test_what_is_out_of_range_is_refused(name: str, value: int) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(UsageError, match=name) as error:
        load_settings({}, **options)
    assert "…" in error.value.remedy
    with pytest.raises(UsageError, match=name):
        load_settings({f"RENDER_PLATFORM_{name.upper()}": str(value)})


@pytest.mark.parametrize(("name", "low", "high"), [("batch_rows", 1, 50_000), ("threshold_ppm", 0, 1_000_000)])
def test_bounds_belong_to_the_range(name: str, low: int, high: int) -> None:
    for value in (low, high):
        assert getattr(load_settings({}, None, **{name: value}), name) == value
    for value in (low - 1, high + 1):
        with pytest.raises(UsageError):
            load_settings({}, None, **{name: value})


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_goes_before_defaults_and_after_the_environment(tmp_path: Path) -> None:
    file = written(tmp_path / "rp.toml", 'batch_rows = 7\nbacklog_rows = 8\nstate_dir = "here"\nmeter = "wall_clock"')
    settings = load_settings({"RENDER_PLATFORM_CONFIG": str(file), "RENDER_PLATFORM_BACKLOG_ROWS": "9"}, drain_s=4)
    assert (settings.batch_rows, settings.backlog_rows, settings.drain_s, settings.meter) == (7, 9, 4, "wall_clock")
    assert settings.state_dir == tmp_path / "here"


def test_the_option_names_the_file_rather_than_the_variable(tmp_path: Path) -> None:
    first, second = written(tmp_path / "a.toml", "burst = 1"), written(tmp_path / "b.toml", "burst = 2")
    assert load_settings({"RENDER_PLATFORM_CONFIG": str(first)}, config=second).burst == 2


def test_a_file_holds_the_catalogue(tmp_path: Path) -> None:
    file = written(tmp_path / "rp.toml", '[backends.a]\nkind = "simulated"\n[models.m]\nfamily = "f"')
    assert load_settings({}, config=file).catalogue == {
        "backends": {"a": {"kind": "simulated"}},
        "models": {"m": {"family": "f"}},
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("bach_rows = 7", "did you mean batch_rows?"),
        ("[backend.a]", "did you mean backends?"),
        ("catalogue = 1", "settings are"),
        ('batch_rows = "7"', "whole number"),
        ("batch_rows = true", "whole number"),
        ("meter = 7", "text"),
        ("batch_rows = ", "docs/configuration.md"),
        ("\udcff", "docs/configuration.md"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "rp.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError) as error:
        load_settings({}, config=file)
    assert named in str(error.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none: No such file"):
        load_settings({}, config=tmp_path / "none")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        load_settings({}).batch_rows = 5  # type: ignore[misc]
