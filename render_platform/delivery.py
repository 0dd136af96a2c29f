"""Delivery of sealed batches into the CAS: sealed → stored."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from render_platform import __version__
from render_platform import batches as batch_bytes
from render_platform.cas import Cas
from render_platform.database import Database, batches
from render_platform.errors import Finding
from render_platform.events import merkle_root
from render_platform.note import Signer
from render_platform.outbox import rows_of_batch


class Delivery:
    def __init__(self, database: Database, cas: Cas, signer: Signer) -> None:
        self._database = database
        self._cas = cas
        self._signer = signer

    def store_sealed(self) -> list[str]:
        """Store every sealed batch and its attestation; gives the batch ids. Watermarks have nothing to store."""
        with self._database.read() as connection:
            waiting = connection.execute(
                sa.select(batches).filter_by(state="sealed", type="usage_batch").order_by(batches.c.ordinal)
            ).all()
        for batch in waiting:
            self._store(batch)
        return [batch.batch_id for batch in waiting]

    def _store(self, batch: Any) -> None:
        with self._database.read() as connection:
            table = rows_of_batch(connection, batch.batch_id)
        if merkle_root(table).hex() != batch.merkle_root or table.num_rows != batch.records:
            raise Finding(f"the rows of batch {batch.batch_id} are not those that were sealed", "restore the database")
        data = batch_bytes.encode(table)
        # A crash from here to the commit leaves objects that nothing names; the next call makes the same ones.
        digest = self._cas.put(data)
        envelope = batch_bytes.attest(batch.batch_id, digest, table, self._signer, f"render-platform/{__version__}")
        attestation_digest = self._cas.put(envelope)
        # After this commit the digest is fixed: the batch is never encoded again.
        with self._database.write() as connection:
            connection.execute(
                batches.update()
                .where(batches.c.ordinal == batch.ordinal, batches.c.state == "sealed")
                .values(
                    state="stored",
                    blob_digest=digest,
                    blob_size=len(data),
                    attestation_digest=attestation_digest,
                )
            )
