"""Users and teams as administrators set them: limits, team, and whether a user is disabled.

All of them are in memory, so that a request looks nothing up. A user or a team without a row has no limits of
its own.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from service.errors import DependencyUnavailableError, ValidationError
from service.identity.changes import ChangeFeed, note_change
from service.identity.database import Database, DatabaseFailedError, metadata
from service.identity.principal import MAX_NAME_CHARS, NO_LIMITS, Limits

MAX_ROWS: Final = 50_000
"""How many users, and how many teams, can be set: each process has them in memory."""

KIND: Final = "account"
"""Of a change: all accounts are read again."""

TEAMS: Final = sa.Table(
    "teams",
    metadata,
    sa.Column("name", sa.String(MAX_NAME_CHARS), primary_key=True),
    sa.Column("limits", sa.Text, nullable=False),
)
USERS: Final = sa.Table(
    "users",
    metadata,
    sa.Column("name", sa.String(MAX_NAME_CHARS), primary_key=True),
    sa.Column("limits", sa.Text, nullable=False),
    sa.Column("team", sa.String(MAX_NAME_CHARS), nullable=True),
    sa.Column("disabled", sa.Boolean, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Team:
    """A team and what it may do."""

    name: str
    limits: Limits = NO_LIMITS


@dataclass(frozen=True, slots=True)
class User:
    """A user, built-in or not, and what they may do.

    Args:
        name: The user's name.
        limits: Their limits; a rate replaces ``RATE_LIMIT``.
        team: The team that their calls belong to.
        disabled: Whether all of their tokens and keys are refused.
    """

    name: str
    limits: Limits = NO_LIMITS
    team: str | None = None
    disabled: bool = False


class Accounts:
    """Knows users and teams, and changes them.

    Args:
        database: Where they are kept.
        feed: Tells what other processes change.
        now: Unix time in seconds.
    """

    def __init__(self, database: Database, feed: ChangeFeed, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._feed = feed
        self._now = now
        self._users: Mapping[str, User] = {}
        self._teams: Mapping[str, Team] = {}
        self.version = 0
        """Changes with every change of a user or a team."""
        feed.subscribe(KIND, self._reload)

    @property
    def are_stale(self) -> bool:
        """Whether what is known of keys, users and teams may not be used any more."""
        return self._feed.is_stale

    def user(self, name: str) -> User:
        """A user as they were set."""
        return self._users.get(name) or User(name)

    def team(self, name: str) -> Team:
        """A team as it was set."""
        return self._teams.get(name) or Team(name)

    @property
    def users(self) -> Sequence[User]:
        """The users that were set, by name."""
        return sorted(self._users.values(), key=lambda user: user.name)

    @property
    def teams(self) -> Sequence[Team]:
        """The teams that were set, by name."""
        return sorted(self._teams.values(), key=lambda team: team.name)

    async def put_user(self, user: User) -> None:
        """Set a user; at once in this process.

        Raises:
            ValidationError: There are too many.
            DependencyUnavailableError: The database does not answer.
        """
        await self._put(
            USERS,
            {
                "name": user.name,
                "limits": user.limits.to_json(),
                "team": user.team,
                "disabled": user.disabled,
            },
            new=user.name not in self._users and len(self._users) >= MAX_ROWS,
        )
        self._users = {**self._users, user.name: user}
        self.version += 1

    async def put_team(self, team: Team) -> None:
        """Set a team; raises as ``put_user``."""
        await self._put(
            TEAMS,
            {"name": team.name, "limits": team.limits.to_json()},
            new=team.name not in self._teams and len(self._teams) >= MAX_ROWS,
        )
        self._teams = {**self._teams, team.name: team}
        self.version += 1

    async def _put(self, table: sa.Table, row: Mapping[str, object], *, new: bool) -> None:
        if new:
            raise ValidationError(f"There are {MAX_ROWS:,} of them already, and no more are possible.")
        changed = {name: value for name, value in row.items() if name != "name"}

        def upsert(connection: sa.Connection) -> None:
            insert = self._database.insert(table).values(**row)
            connection.execute(insert.on_conflict_do_update(index_elements=["name"], set_=changed))
            note_change(connection, KIND, str(row["name"]), int(self._now()))

        try:
            await self._database.run("keep", upsert, writes=True)
        except DatabaseFailedError:
            raise DependencyUnavailableError from None

    async def _reload(self, _names: Collection[str] | None) -> None:
        """Read all of them again: they are few, and change rarely. Raises ``DatabaseFailedError``."""

        def select(connection: sa.Connection) -> tuple[Mapping[str, User], Mapping[str, Team]]:
            users = {
                row.name: User(row.name, Limits.from_json(row.limits), row.team, row.disabled)
                for row in connection.execute(sa.select(USERS).limit(MAX_ROWS))
            }
            teams = {
                row.name: Team(row.name, Limits.from_json(row.limits))
                for row in connection.execute(sa.select(TEAMS).limit(MAX_ROWS))
            }
            return users, teams

        self._users, self._teams = await self._database.run("find", select, writes=False)
        self.version += 1
