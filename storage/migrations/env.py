"""What Alembic runs for each command. It knows only the connection that `upgrade_to_head` hands over."""

from alembic import context
from tuneloop.storage.tables import Table

context.configure(connection=context.config.attributes["connection"], target_metadata=Table.metadata)
with context.begin_transaction():
    context.run_migrations()
