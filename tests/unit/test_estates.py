"""What dead processes left: whose it is, and that it is one heir's at a time."""

import json
from pathlib import Path

import pytest

from service.recording.record import read_records
from service.recording.spool import OrphanedSpool, Spool, lock_path, orphaned_spools, run_file
from tests.unit.recording import OWNER_OF_ONE, Lost, killed_owner, lines, make_record, number_of, python

NAMES = [f"20260101T00000{number}-{number}-00000{number}" for number in range(5)]


def leave(folder: Path, name: str, *numbers: int) -> None:
    """What a process of this name left behind when it was killed."""
    lock_path(folder, name).touch()
    (folder / f"{name}.000000.jsonl").write_bytes(lines(*numbers))
    run_file(folder, name).write_text("{}")


def numbers_of(estate: OrphanedSpool) -> list[int]:
    return [number_of(record) for path in estate.segments for record in read_records(path)[0]]


def test_what_a_living_process_has_is_nobodys_and_a_killed_ones_is_the_heirs(tmp_path: Path) -> None:
    line = make_record(1).as_line().decode().strip()
    with python(OWNER_OF_ONE, str(tmp_path), line) as owner:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        assert list(orphaned_spools(tmp_path)) == []
        assert lock_path(tmp_path, name).exists()
        owner.kill()
        owner.wait()
        found = [(estate.name, numbers_of(estate)) for estate in orphaned_spools(tmp_path)]
    assert found == [(name, [1])]


def test_this_process_is_alive_too(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1_000_000, Lost())
    spool.append(lines(1), spooled=False)
    assert list(orphaned_spools(tmp_path)) == []
    spool.close()
    assert [numbers_of(estate) for estate in orphaned_spools(tmp_path)] == [[1]]


def test_a_torn_line_of_a_killed_process_is_passed_over(tmp_path: Path) -> None:
    name = killed_owner(tmp_path, 1, 2, 3)
    path = tmp_path / f"{name}.000000.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    (estate,) = [(each.name, numbers_of(each)) for each in orphaned_spools(tmp_path)]
    assert estate == (name, [1, 2])


def test_estates_come_oldest_first_and_their_files_in_order(tmp_path: Path) -> None:
    for name in (NAMES[2], NAMES[0], NAMES[1]):
        leave(tmp_path, name, 1)
    (tmp_path / f"{NAMES[0]}.000001.jsonl").write_bytes(lines(2))
    assert [(estate.name, numbers_of(estate)) for estate in orphaned_spools(tmp_path)] == [
        (NAMES[0], [1, 2]),
        (NAMES[1], [1]),
        (NAMES[2], [1]),
    ]


def test_a_lock_goes_with_the_last_of_the_files(tmp_path: Path) -> None:
    leave(tmp_path, NAMES[0], 1)
    leave(tmp_path, NAMES[1], 2)
    for estate in orphaned_spools(tmp_path):
        if estate.name == NAMES[0]:
            estate.clear()
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {NAMES[1]}
    assert lock_path(tmp_path, NAMES[1]).exists()


def test_a_lock_alone_is_no_estate_and_is_tidied(tmp_path: Path) -> None:
    lock_path(tmp_path, NAMES[0]).touch()
    assert list(orphaned_spools(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_files_without_a_lock_are_an_estate(tmp_path: Path) -> None:
    leave(tmp_path, NAMES[0], 1)
    lock_path(tmp_path, NAMES[0]).unlink()
    assert [numbers_of(estate) for estate in orphaned_spools(tmp_path)] == [[1]]


def test_what_somebody_else_put_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "20260101.jsonl").write_bytes(lines(1))
    (tmp_path / f"x{NAMES[0]}.000000.jsonl").write_bytes(lines(1))
    assert list(orphaned_spools(tmp_path)) == []
    assert len(list(tmp_path.iterdir())) == 3


def test_no_folder_is_no_estate_and_a_folder_that_is_none_is_an_error(tmp_path: Path) -> None:
    assert list(orphaned_spools(tmp_path / "nowhere")) == []
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        list(orphaned_spools(tmp_path / "file"))


def test_an_estate_has_one_heir_at_a_time(tmp_path: Path) -> None:
    leave(tmp_path, NAMES[0], 1)
    leave(tmp_path, NAMES[1], 2)
    first, second = orphaned_spools(tmp_path), orphaned_spools(tmp_path)
    assert next(first).name == NAMES[0]
    assert next(second).name == NAMES[1]
    assert list(second) == []
    first.close()
    assert [estate.name for estate in orphaned_spools(tmp_path)] == NAMES[:2]


def test_an_heir_that_comes_late_finds_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    leave(tmp_path, NAMES[0], 1)
    leave(tmp_path, NAMES[1], 2)
    slow = orphaned_spools(tmp_path)
    assert next(slow).name == NAMES[0]
    for estate in orphaned_spools(tmp_path):
        assert estate.name == NAMES[1]
        estate.clear()
    # It has the name from before, and nothing is there under it any more.
    assert list(slow) == []
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {NAMES[0]}


HEIR = """
    import json, sys
    from pathlib import Path
    from service.recording.record import read_records
    from service.recording.spool import orphaned_spools

    print("ready", flush=True)
    sys.stdin.readline()
    found = []
    for _round in range(20):
        for spool in orphaned_spools(Path(sys.argv[1])):
            for path in spool.segments:
                found += [int(record.trace_id, 16) for record in read_records(path)[0]]
            spool.clear()
    print(json.dumps(found))
"""


def test_two_heirs_at_once_take_each_record_once(tmp_path: Path) -> None:
    for number in range(200):
        leave(tmp_path, f"20260101T000000-{number}-{number:06x}", number)
    expected = sorted(int(make_record(number).trace_id, 16) for number in range(200))
    with python(HEIR, str(tmp_path)) as one, python(HEIR, str(tmp_path)) as other:
        for heir in (one, other):
            assert heir.stdout is not None
            assert heir.stdout.readline() == "ready\n"
        found = []
        for heir in (one, other):
            assert heir.stdin is not None
            heir.stdin.write("go\n")
            heir.stdin.flush()
        for heir in (one, other):
            assert heir.stdout is not None
            found.append(json.loads(heir.stdout.read()))
    assert sorted(found[0] + found[1]) == expected
    assert list(tmp_path.iterdir()) == []


def test_an_estate_that_is_too_old_goes_and_says_how_much_it_was(tmp_path: Path) -> None:
    leave(tmp_path, NAMES[0], 1, 2)
    (tmp_path / f"{NAMES[0]}.000001.jsonl").write_bytes(lines(3) + b"garbled\n" + b"torn")
    (estate,) = [
        (each.expire(3_600), each.expire(-1), each.expire(-1), len(each.segments))
        for each in orphaned_spools(tmp_path)
    ]
    assert estate == (0, 4, 0, 0)
    assert run_file(tmp_path, NAMES[0]).exists()
