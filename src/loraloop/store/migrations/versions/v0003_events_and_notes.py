"""Version 3: what happened to the loop, and what it must not forget."""

from alembic import op

from loraloop.store import schema

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Two tables more."""
    schema.metadata.create_all(op.get_bind(), tables=list(schema.ADDED_IN_3))
