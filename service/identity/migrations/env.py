"""Runs the migrations on the connection that ``database.migrate`` has opened and locked."""

from alembic import context

from service.identity.database import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
context.run_migrations()
