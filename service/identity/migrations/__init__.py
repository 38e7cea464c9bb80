"""The migrations of the SQL database, in Alembic's layout; ``database.migrate`` runs them.

Each file in ``versions`` is one step. A step that was released is never changed.
"""
