"""Finds the records of an id where they are kept: in the spools of this machine, and in MLflow. It blocks.

The spools are those of all processes that share the folder. Reading takes no lock: a file that is being sent
may disappear, and its records are in MLflow then, which is searched afterwards.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from service.recording.mlflow import GoneError, NoTracker, Tracker, TrackerError
from service.recording.record import CallRecord
from service.recording.request_key import RequestKey
from service.recording.traces import record_in

MAX_FOUND: Final = 50
"""The most records of one id: a caller decides how many requests have the same trace."""

SPOOL_LIMIT_S: Final = 2.0
MAX_FILE_BYTES: Final = 16_777_216
"""The largest file of a spool that is read; with captured prompts one line may be larger than a segment."""

CONTINUED: Final = b'"continued":true'

SEARCHED: Final = "searched"
PARTLY: Final = "searched in part"
OFF: Final = "not configured"


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to.

    Args:
        records: The records, without prompt and answer.
        state: ``searched``, ``searched in part``, ``not configured``, or why it failed.
        complete: Whether there are no others.
    """

    records: tuple[CallRecord, ...]
    state: str
    complete: bool


def search_spools(
    folder: Path,
    key: RequestKey,
    user: str | None = None,
    limit_s: float = SPOOL_LIMIT_S,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Look through the files of all spools of a folder, the newest first.

    Args:
        folder: Where the spools are.
        key: The id.
        user: Whose records are wanted; None for all.
        limit_s: Seconds after which no other file is read.
        clock: Monotonic, in seconds.
    """
    end_s = clock() + limit_s
    found: list[CallRecord] = []
    whole = True
    try:
        paths = sorted(folder.glob("*.jsonl"), reverse=True)
    except OSError as error:
        return Found((), f"failed: {type(error).__name__}", complete=False)
    for path in paths:
        if clock() > end_s or len(found) >= MAX_FOUND:
            whole = False
            break
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                whole = False
                continue
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError:
            whole = False
            continue
        found += [record for record in _in_file(content, key) if user in {None, record.user}]
    return Found(tuple(found[:MAX_FOUND]), SEARCHED if whole else PARTLY, complete=whole)


def _in_file(content: bytes, key: RequestKey) -> list[CallRecord]:
    digits = key.digits.encode()
    # The record's id of a continued trace is not in its line: it is computed from what is.
    marks = (digits, CONTINUED) if key.kind == "record" else (digits,)
    found: list[CallRecord] = []
    if not any(mark in content for mark in marks):
        return found
    for line in content.split(b"\n"):
        if any(mark in line for mark in marks):
            try:
                record = CallRecord.from_line(line)
            except ValueError:
                continue
            if key.names(record):
                found.append(record)
    return found


def search_mlflow(tracker: Tracker | NoTracker, key: RequestKey, user: str | None = None) -> Found:
    """Ask MLflow for the records of an id; those of one user, or of all."""
    if isinstance(tracker, NoTracker):
        return Found((), OFF, complete=True)
    try:
        traces = tracker.traces(key.text if key.kind == "record" else None, _query(key, user), MAX_FOUND)
    except GoneError:
        # There is no experiment yet, or no such record.
        return Found((), SEARCHED, complete=True)
    except TrackerError as error:
        return Found((), f"failed: {error.reason}", complete=False)
    read = [record for trace in traces if (record := record_in(trace)) is not None]
    records = [record for record in read if key.names(record) and user in {None, record.user}]
    return Found(tuple(records), SEARCHED, complete=len(traces) < MAX_FOUND)


def _query(key: RequestKey, user: str | None) -> str:
    """The filter that finds the records of an id; by user as well, as far as MLflow can quote the name."""
    query = f"tags.{'incident_id' if key.kind == 'incident' else 'request_id'} = '{key.text}'"
    if user is None or "'" in user:
        return query
    return f"{query} AND metadata.`mlflow.trace.user` = '{user}'"
