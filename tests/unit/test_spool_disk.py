"""The spool on a disk that takes nothing more: a file-size limit, and a file system that is full."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.unit.recording import python

LIMIT_BYTES = 10_000
"""What a file may have, where it is limited: some 40 records, and no whole number of them."""

FULL = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs "$0" && exec "$@"')
"""A file system of its own with 64 KiB; gone with the process."""


def can_mount(folder: str = "/mnt") -> bool:
    """Whether this machine lets the tests have a file system."""
    try:
        return subprocess.run([*FULL, folder, "true"], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


KINDS = ["size limit", *(["full disk"] if can_mount() else [])]

WRITER = """
    import json, os, resource, sys
    from pathlib import Path
    from service.recording.record import CallRecord, read_records
    from service.recording.spool import Spool, spool_files

    def line_of(number):
        record = CallRecord(
            trace_id=f"{number:032x}",
            span_id=f"{number:016x}",
            operation="chat",
            started_ns=1,
            duration_s=1.0,
            user="user",
            model="demo",
            outcome="success",
        )
        return record.as_line()

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if int(sys.argv[2]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), before[1]))
    spool = Spool(Path(sys.argv[1], "spool"), 10_000_000, print)
    taken, refused = [], []

    def write(numbers):
        for number in numbers:
            try:
                spool.append(line_of(number), spooled=False)
            except OSError as error:
                refused.append(type(error).__name__)
            else:
                taken.append(number)

    def on_disk():
        paths = spool_files(spool.folder, spool.name)
        found = [read_records(path) for path in paths]
        return {
            "numbers": [int(record.trace_id, 16) for records, _garbled in found for record in records],
            "garbled": sum(garbled for _records, garbled in found),
            "whole": all(path.read_bytes()[-1:] in (b"\\n", b"") for path in paths),
        }

    write(range(400))
    first = {"taken": list(taken), "refused": len(refused), "on_disk": on_disk()}
    descriptors = len(os.listdir("/proc/self/fd"))
    segment = spool.take()
    gone = len(read_records(segment.path)[0])
    spool.done(segment)
    refused.clear()
    write(range(1_000, 1_010))
    second = {"taken": taken[gone:], "refused": len(refused), "on_disk": on_disk()}
    # Whoever writes at the end of the process, like a measurement of coverage, is not limited.
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    print(json.dumps({"first": first, "second": second, "descriptors": descriptors}))
"""


def write(folder: Path, kind: str) -> Any:
    limit = LIMIT_BYTES if kind == "size limit" else 0
    wrapper = FULL if kind == "full disk" else ()
    place = (str(folder),) if wrapper else ()
    with python(WRITER, str(folder), str(limit), wrapper=(*wrapper, *place)) as writer:
        assert writer.stdout is not None
        return json.loads(writer.stdout.read())


@pytest.mark.parametrize("kind", KINDS)
def test_no_torn_line_is_left_where_the_disk_takes_a_part(tmp_path: Path, kind: str) -> None:
    said = write(tmp_path, kind)
    first, second = said["first"], said["second"]
    # Some were refused, and said to be; all others are there, each once, in whole lines.
    assert 0 < first["refused"] < 400
    assert first["refused"] + len(first["taken"]) == 400
    assert first["on_disk"] == {"numbers": first["taken"], "garbled": 0, "whole": True}
    # With room it goes on, and the file of before is not in its way.
    assert second["refused"] < 10
    assert second["on_disk"] == {"numbers": second["taken"], "garbled": 0, "whole": True}
    assert said["descriptors"] < 12


def test_a_file_that_may_not_grow_costs_one_record_and_not_all_that_follow(tmp_path: Path) -> None:
    first = write(tmp_path, "size limit")["first"]
    # One for each file that is full, and a file holds more than 30.
    assert first["refused"] <= 400 // 30
