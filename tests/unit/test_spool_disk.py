"""The spool on a disk that accepts a part of a line: a limit on the size of files."""

import json
from pathlib import Path

from tests.unit.recording import python

WRITER = """
    import json, resource, sys
    from pathlib import Path
    from service.recording.record import CallRecord, read_records
    from service.recording.spool import Spool, spool_files
    from tests.unit.recording import lines, number_of

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    spool = Spool(Path(sys.argv[1]), 10_000_000, print)
    accepted = []
    for number in range(400):
        try:
            spool.append(lines(number), spooled=False)
        except OSError:
            continue
        accepted.append(number)
    paths = spool_files(spool.folder, spool.name)
    found = [read_records(path) for path in paths]
    complete = all(path.read_bytes().endswith(b"\\n") for path in paths)
    # Whatever writes at the end of the process, like the measurement of coverage, is not limited.
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    on_disk = [number_of(record) for records, _invalid in found for record in records]
    invalid = sum(invalid for _records, invalid in found)
    print(json.dumps([accepted, on_disk, invalid, complete]))
"""
"""A file may have 10,000 bytes, which are about 40 records and not a whole number of them."""


def test_no_partial_line_is_left_and_each_full_file_costs_one_record(tmp_path: Path) -> None:
    with python(WRITER, str(tmp_path)) as writer:
        assert writer.stdout is not None
        accepted, on_disk, invalid, complete = json.loads(writer.stdout.read())
    # Those refused were reported, and the others are on disk, each once and in complete lines.
    assert (on_disk, invalid, complete) == (accepted, 0, True)
    assert 0 < 400 - len(accepted) <= 400 // 30
