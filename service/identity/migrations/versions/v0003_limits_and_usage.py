"""Create the tables of limits of teams and users, of usage by day, and of what was spent of budgets."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "teams",
        sa.Column("name", sa.String(256), primary_key=True),
        sa.Column("limits", sa.Text, nullable=False),
    )
    op.create_table(
        "users",
        sa.Column("name", sa.String(256), primary_key=True),
        sa.Column("limits", sa.Text, nullable=False),
        sa.Column("team", sa.String(256), nullable=True),
        sa.Column("disabled", sa.Boolean, nullable=False),
    )
    op.create_table(
        "usage_by_day",
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("user_name", sa.String(256), primary_key=True),
        sa.Column("team", sa.String(256), primary_key=True),
        sa.Column("key_id", sa.String(12), primary_key=True),
        sa.Column("model", sa.String(256), primary_key=True),
        sa.Column("calls", sa.BigInteger, nullable=False),
        sa.Column("cached", sa.BigInteger, nullable=False),
        sa.Column("errors", sa.BigInteger, nullable=False),
        sa.Column("unpriced", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("cost_nano", sa.BigInteger, nullable=False),
        sa.Column("saved_cost_nano", sa.BigInteger, nullable=False),
    )
    op.create_index("usage_by_day_user", "usage_by_day", ["user_name", "day"])
    op.create_table(
        "usage_records",
        sa.Column("record_id", sa.String(32), primary_key=True),
        sa.Column("taken_at", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_usage_records_taken_at", "usage_records", ["taken_at"])
    op.create_table(
        "budget_spent",
        sa.Column("scope", sa.String(8), primary_key=True),
        sa.Column("name", sa.String(256), primary_key=True),
        sa.Column("period", sa.String(10), primary_key=True),
        sa.Column("cost_nano", sa.BigInteger, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("changed_at", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_budget_spent_changed_at", "budget_spent", ["changed_at"])


def downgrade() -> None:
    """Drop the tables."""
    for name in ("budget_spent", "usage_records", "usage_by_day", "users", "teams"):
        op.drop_table(name)
