"""Version 1: an episode is one text in its row. Only SQLite files have it, with the version in `user_version`."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

FILTERED_COLUMNS = ("learn_model", "scenario", "outcome", "task_id", "group_id")


def upgrade() -> None:
    """Make the tables, unless this is a file of version 1, which did not know Alembic."""
    if sa.inspect(op.get_bind()).has_table("episodes"):
        return
    op.create_table(
        "episodes",
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("learn_model", sa.Text, nullable=False),
        sa.Column("scenario", sa.Text),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("task_id", sa.Text),
        sa.Column("group_id", sa.Text),
        sa.Column("meta", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("episodes_by_position", "episodes", ["created_at", "id"])
    for name in FILTERED_COLUMNS:
        op.create_index(f"episodes_by_{name}", "episodes", [name, "created_at", "id"])
