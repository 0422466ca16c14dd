"""What Alembic runs: the migrations, within the transaction of the connection that it was given."""

from alembic import context

from loraloop.store.schema import version

context.configure(connection=context.config.attributes["connection"], version_table=version.name)
context.run_migrations()
