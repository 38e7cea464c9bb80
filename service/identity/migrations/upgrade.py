"""Brings the tables to this program's version, with Alembic."""

import logging

import alembic.command
import alembic.config
import alembic.migration
import alembic.script
import sqlalchemy as sa

from service.identity.database import MIGRATIONS, VERSION_TABLE, DatabaseUnusableError

logger = logging.getLogger("service.identity.database")


def upgrade(connection: sa.Connection) -> None:
    """Run the migrations that the database has not had yet, in the connection's transaction.

    Raises:
        DatabaseUnusableError: The tables are of a newer version than this program's.
    """
    config = alembic.config.Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    scripts = alembic.script.ScriptDirectory.from_config(config)
    known = {script.revision for script in scripts.walk_revisions()}
    context = alembic.migration.MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    before = context.get_current_revision()
    if before is not None and before not in known:
        raise DatabaseUnusableError(
            f"The database at DATABASE_URL has the schema {before}, which is newer than this version of the "
            "service knows: run the newer version, or name another database"
        )
    if before != scripts.get_current_head():
        alembic.command.upgrade(config, "head")
        logger.info(
            "The database was migrated",
            extra={"from": before or "empty", "to": scripts.get_current_head()},
        )
