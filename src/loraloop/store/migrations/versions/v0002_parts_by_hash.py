"""Version 2: large parts of episodes are kept once, by hash; labels and tombstones.

Its tables are those of `schema.py` but for what version 3 adds; whoever changes one of them freezes a copy of them here.
"""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

from loraloop.episode import Episode
from loraloop.errors import StoreError
from loraloop.store import schema
from loraloop.store.parts import Packer, encode
from loraloop.store.rows import insert_new, to_row
from loraloop.store.text import from_body

revision = "0002"
down_revision = "0001"

PAGE_ROWS = 200


def upgrade() -> None:
    """Write every episode anew, in pages; memory does not grow with the store, and until the commit the old one is all there is."""
    connection = op.get_bind()
    for name in ("position", *schema.FILTERED_COLUMNS):
        op.drop_index(f"episodes_by_{name}", "episodes")
    op.rename_table("episodes", "episodes_1")
    if connection.dialect.name == "postgresql":  # where indexes of constraints keep their names
        op.execute("ALTER INDEX episodes_pkey RENAME TO episodes_1_pkey")
        op.execute("ALTER INDEX episodes_id_key RENAME TO episodes_1_id_key")
    others = [table for table in schema.metadata.sorted_tables if table not in (schema.version, *schema.ADDED_IN_3)]
    schema.metadata.create_all(connection, tables=others)
    connection.execute(schema.generation.insert().values(value=0))
    old = sa.table("episodes_1", sa.column("seq"), sa.column("id"), sa.column("body"))
    last = 0
    while rows := connection.execute(sa.select(old).where(old.c.seq > last).order_by(old.c.seq).limit(PAGE_ROWS)).all():
        _convert(connection, rows)
        last = rows[-1].seq
    op.drop_table("episodes_1")


def _convert(connection: sa.Connection, rows: Sequence[sa.Row[Any]]) -> None:
    packer = Packer()
    new, bodies = [], []
    blobs: dict[bytes, bytes] = {}
    for row in rows:
        try:
            episode = from_body(Episode, row.body)
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"episode {row.id} cannot be read: {error}; the file is as it was: restore it from a backup, or remove that row"
            ) from error
        encoded = encode(episode)
        new.append(to_row(row.seq, episode, encoded, packer))
        bodies.append({"seq": row.seq, "body": packer.pack(encoded.body)})
        blobs |= {key: packer.pack(text) for key, text in encoded.blobs.items() if key not in blobs}
    insert_new(connection, schema.blobs, [{"key": key, "data": data} for key, data in blobs.items()])
    connection.execute(schema.episodes.insert(), new)
    connection.execute(schema.bodies.insert(), bodies)
