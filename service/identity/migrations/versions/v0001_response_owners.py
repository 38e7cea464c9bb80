"""Create the table of the owners of stored responses."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "response_owners",
        sa.Column("id_hash", sa.LargeBinary(32), primary_key=True),
        sa.Column("owner", sa.String(256), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.create_index("response_owners_created_at", "response_owners", ["created_at"])


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("response_owners")
