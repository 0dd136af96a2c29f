"""Where Dagster keeps runs, events and ticks: where the platform keeps its state, by the same setting.

dagster.yaml names `PlatformStorage`, and no more: with `database_url` it is PostgreSQL, in a schema of its own, because
both have tables of the same names; without, SQLite in DAGSTER_HOME. So the file holds no password, and one fits both.
A module by itself, and installed: each of Dagster's programs opens the instance, wherever it is started.
"""

from __future__ import annotations

import os
from typing import Any

import sqlalchemy as sa
from dagster._core.storage.base_storage import DagsterStorage
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClass, ConfigurableClassData

from render_platform.config import load_settings
from render_platform.errors import Unavailable, UsageError

SCHEMA = "dagster"
CONNECT_S = 30
_CREATION_LOCK = 0x646167737465  # the key of PostgreSQL's advisory lock, one in a database
_LAST_TABLE = f"{SCHEMA}.instigators"


class PlatformStorage(DagsterStorage, ConfigurableClass):
    """Never made itself: what dagster.yaml names becomes one of Dagster's own storages."""

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config_value(  # type: ignore[override]  # as Dagster's own
        cls,
        inst_data: ConfigurableClassData | None,  # noqa: ARG003
        config_value: Any,  # noqa: ARG003
    ) -> DagsterStorage:
        if url := load_settings().database_url:
            return open_postgres(url)
        home = os.environ.get("DAGSTER_HOME")
        if not home:
            raise UsageError("DAGSTER_HOME is not set", "set it to dagster/ of the state folder")
        return DagsterSqliteStorage.from_local(home)


def open_postgres(url: str) -> DagsterStorage:
    """Dagster's storage in the schema `dagster` of our database, which is made, with its tables, where it is missing.

    Its connections are psycopg2's: Dagster relies on what that driver does. But in the webserver, which keeps one a
    storage, none is held: each statement's is closed after it.
    """
    try:
        from dagster_postgres import DagsterPostgresStorage
    except ImportError as error:
        raise Unavailable("Dagster on PostgreSQL needs dagster-postgres", "install it, or requirements.txt") from error
    own = own_url(url)
    engine = sa.create_engine(own, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT", hide_parameters=True)
    try:
        with engine.connect() as connection:
            if connection.execute(sa.select(sa.func.to_regclass(_LAST_TABLE))).scalar() is None:
                # Held to the end of the connection: of two programs that start at once, one makes the tables.
                connection.execute(sa.select(sa.func.pg_advisory_lock(_CREATION_LOCK)))
                if connection.execute(sa.select(sa.func.to_regnamespace(SCHEMA))).scalar() is None:
                    connection.execute(sa.schema.CreateSchema(SCHEMA))
                return DagsterPostgresStorage(own)
    except sa.exc.DBAPIError as error:
        remedy = f"check the server; who may not make schemas needs one: CREATE SCHEMA {SCHEMA} AUTHORIZATION its_role"
        raise Unavailable(f"Dagster's storage cannot be used: {error.orig}".strip(), remedy) from None
    return DagsterPostgresStorage(own)


def own_url(url: str) -> str:
    """The platform's URL, whose names are looked up in Dagster's schema alone."""
    try:
        address = sa.make_url(url).set(drivername="postgresql+psycopg2")
    except (sa.exc.ArgumentError, ValueError):  # its text may quote a password
        raise UsageError("database_url is malformed", "set it to postgresql://user:password@host:port/name") from None
    # Dagster keeps times without a zone, as of the session's, and reads them as UTC.
    options = f"{address.query.get('options', '')} -c search_path={SCHEMA} -c timezone=UTC".strip()
    query = {"connect_timeout": str(CONNECT_S), **address.query, "options": options}
    return address.set(query=query).render_as_string(hide_password=False)
