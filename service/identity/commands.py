"""The commands that work on the database: ``keys``, ``usage``, ``migrate``, ``replay``.

They need no running service. One that runs takes a new key at once, and ends a revoked one within seconds.
People get tables, programs JSON (``--json``).
"""

import argparse
import asyncio
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, date, datetime
from typing import Any, Final, cast

from opentelemetry.metrics import NoOpMeterProvider

from service.config.settings import Settings
from service.errors import DependencyUnavailableError, NotFoundError, ValidationError
from service.identity.audit import COMMAND_LINE, report_change
from service.identity.changes import ChangeFeed
from service.identity.database import DatabaseUnusableError, make_engine, migrate, open_database
from service.identity.keys import ApiKey, ApiKeys, key_secret, new_id
from service.identity.ledger import DIMENSIONS, Dimension, DirectLedger, Ledger, UsageQuery, records_kept_s
from service.identity.principal import Budget, Limits, Period, Unit, checked_name, checked_rate
from service.recording.recorder import replay
from service.telemetry.instruments import Instruments

COLUMNS: Final = ("id", "name", "owner", "team", "created_at", "expires_at", "last_used_at", "revoked_at")
PAGE: Final = 1_000
MAX_DAYS: Final = 36_500
BUDGET: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(usd|tokens)/(day|month)")

logger = logging.getLogger(__name__)


def add_parsers(commands: Any) -> None:  # noqa: ANN401 - argparse does not name this type
    """Add the commands ``keys`` and ``usage`` to a parser's."""
    keys = commands.add_parser("keys", help="make, list, revoke and rotate API keys")
    actions = keys.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="make a key, and print it once")
    create.add_argument("name", type=_name, help="what the key is for")
    create.add_argument("--owner", type=_name, required=True, help="the user for whom calls are made")
    create.add_argument("--team", type=_name, help="the team that its calls belong to")
    create.add_argument("--role", choices=("user", "admin"), default="user")
    create.add_argument(
        "--model", action="append", dest="models", type=_name, help="a model that it may ask; repeatable"
    )
    create.add_argument("--rate", type=_rate, help="calls in a period, for example 60/minute")
    create.add_argument("--budget", type=_budget, help="for example 20usd/month, or 1000000tokens/day")
    create.add_argument("--days", type=_days, help="days until it expires")
    listed = actions.add_parser("list", help="list keys, without their secrets")
    listed.add_argument("--owner", type=_name, help="only this owner's")
    listed.add_argument("--team", type=_name, help="only this team's")
    revoke = actions.add_parser("revoke", help="end a key")
    revoke.add_argument("id", type=_name)
    rotate = actions.add_parser("rotate", help="give a key a new secret, and print it once")
    rotate.add_argument("id", type=_name)
    rotate.add_argument("--overlap-s", type=_seconds, default=0, help="seconds for which the old one works")
    usage = commands.add_parser("usage", help="show calls, tokens and cost")
    usage.add_argument("--from", dest="since", type=date.fromisoformat, help="the first day, as 2026-01-15")
    usage.add_argument("--to", dest="until", type=date.fromisoformat, help="the last day")
    usage.add_argument("--by", default="day", help=f"some of {','.join(DIMENSIONS)}")
    usage.add_argument("--user", type=_name, help="only this user's")
    for parser in (create, listed, revoke, rotate, usage):
        parser.add_argument("--json", action="store_true", help="print JSON")


def _checked(check: Callable[[str], str]) -> Callable[[str], str]:
    """A check as argparse calls it, which shows the message of no other error."""

    def checked(text: str) -> str:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


_name, _rate = _checked(checked_name), _checked(checked_rate)


def _budget(text: str) -> Budget:
    found = BUDGET.fullmatch(text)
    if found is not None:
        return Budget(float(found[1]), cast("Unit", found[2]), cast("Period", found[3]))
    raise argparse.ArgumentTypeError("must be an amount and a period, such as 20usd/month or 5000tokens/day")


def _days(text: str) -> int:
    return _between(text, 1, MAX_DAYS)


def _seconds(text: str) -> int:
    return _between(text, 0, 30 * 86_400)


def _between(text: str, least: int, most: int) -> int:
    if not text.isascii() or not text.isdigit() or not least <= int(text[:12]) <= most:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}")
    return int(text)


def run(settings: Settings, command: str, arguments: argparse.Namespace) -> int:
    """Run one of the commands; 1 where it fails: the database cannot be used, or there is no such key."""
    try:
        match command:
            case "migrate":
                _migrate(settings)
            case "replay":
                return _replay(settings)
            case "usage":
                asyncio.run(_usage(settings, arguments))
            case _:
                asyncio.run(_keys(settings, arguments))
    except DatabaseUnusableError as error:
        logger.error("Error: %s", error)  # noqa: TRY400 - a problem of the configuration, not a bug
    except (NotFoundError, DependencyUnavailableError, ValidationError) as error:
        logger.error("Error: %s", error.message)  # noqa: TRY400 - as above
    else:
        return 0
    return 1


def _migrate(settings: Settings) -> None:
    engine = make_engine(settings)
    try:
        migrate(engine)
    finally:
        engine.dispose()
    logger.info("The database is up to date")


def _replay(settings: Settings) -> int:
    engine = make_engine(settings)
    try:
        migrate(engine)
        return replay(settings, DirectLedger(engine))
    finally:
        engine.dispose()


async def _keys(settings: Settings, arguments: argparse.Namespace) -> None:
    async with open_database(settings, _no_instruments()) as database:
        keys = ApiKeys(database, key_secret(settings), ChangeFeed(database, 0))
        match arguments.action:
            case "create":
                key = _asked(arguments)
                _print_keys([key], arguments, secret=await keys.create(key))
                report_change(COMMAND_LINE, "key_created", key.id, owner=key.owner, team=key.team)
            case "list":
                _print_keys(await _all(keys, arguments), arguments)
            case "revoke":
                key = await keys.revoke(arguments.id)
                _print_keys([key], arguments)
                report_change(COMMAND_LINE, "key_revoked", key.id, owner=key.owner)
            case _:
                key, text = await keys.rotate(arguments.id, arguments.overlap_s)
                _print_keys([key], arguments, secret=text)
                report_change(COMMAND_LINE, "key_rotated", key.id, owner=key.owner)


def _no_instruments() -> Instruments:
    return Instruments(NoOpMeterProvider().get_meter(__name__))


def _asked(arguments: argparse.Namespace) -> ApiKey:
    now = int(time.time())
    return ApiKey(
        new_id(),
        arguments.name,
        arguments.owner,
        arguments.role,
        arguments.team,
        Limits(tuple(arguments.models) if arguments.models else None, arguments.rate, arguments.budget),
        now,
        None if arguments.days is None else now + arguments.days * 86_400,
    )


async def _all(keys: ApiKeys, arguments: argparse.Namespace) -> list[ApiKey]:
    found: list[ApiKey] = []
    while page := await keys.page(
        owner=arguments.owner, team=arguments.team, after=found[-1].id if found else "", limit=PAGE
    ):
        found += page
    return found


def _print_keys(keys: Sequence[ApiKey], arguments: argparse.Namespace, *, secret: str | None = None) -> None:
    """Print keys, and the secret of the one that has a new one."""
    if arguments.json:
        for key in keys:
            sys.stdout.write(json.dumps({**asdict(key), **({"key": secret} if secret else {})}) + "\n")
        return
    _print_table([{column: getattr(key, column) for column in COLUMNS} for key in keys], COLUMNS)
    if secret is not None:
        sys.stdout.write(f"\n{secret}\n\nKeep it now: it is shown nowhere else.\n")


async def _usage(settings: Settings, arguments: argparse.Namespace) -> None:
    asked = [part.strip() for part in arguments.by.split(",") if part.strip()]
    if not set(asked) <= set(DIMENSIONS):
        raise ValidationError(f"--by must be some of {','.join(DIMENSIONS)}")
    by = tuple(dict.fromkeys(cast("list[Dimension]", asked)))
    until = arguments.until or datetime.now(UTC).date()
    query = UsageQuery(arguments.since or until.replace(day=1), until, by, arguments.user)
    instruments = _no_instruments()
    async with open_database(settings, instruments) as database:
        kept_s = records_kept_s(settings)
        ledger = Ledger(database, instruments, known=lambda model: model, records_kept_s=kept_s)
        rows, total = await ledger.usage(query)
    if arguments.json:
        days = {"from": query.since.isoformat(), "to": query.until.isoformat()}
        sys.stdout.write(json.dumps({**days, "rows": rows, "total": total}) + "\n")
        return
    columns = (*by, *total)
    _print_table([*rows, {**dict.fromkeys(by, "total"), **total}], columns)


def _print_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    lines = [[column.removesuffix("_at") for column in columns]]
    lines += [[_cell(column, row[column]) for column in columns] for row in rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _cell(column: str, value: object) -> str:
    if value is None:
        return "-"
    if column.endswith("_at") and isinstance(value, int):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M")
    return f"{value:.6f}" if isinstance(value, float) else str(value)
