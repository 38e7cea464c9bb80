"""The thread that writes log lines: in order, never waited for, bounded, and drained at the end."""

import os
import time

from service.config.logging import LineWriter


def test_lines_come_in_order_and_draining_waits_for_them() -> None:
    read, write = os.pipe()
    writer = LineWriter(write)
    for number in range(200):
        writer.write(f"{number}\n")
    writer.drain()
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read().split() == [str(number) for number in range(200)]


def test_with_nobody_reading_lines_are_dropped_and_counted_and_nobody_waits() -> None:
    read, write = os.pipe()
    writer = LineWriter(write, max_lines=10)
    big = "x" * 1_000_000
    started = time.monotonic()
    for _ in range(50):
        writer.write(big)
    assert writer.dropped >= 50 - 10 - 10
    writer.drain(limit_s=0.05)
    assert time.monotonic() - started < 5
    # Whoever reads again gets on with it.
    total = 0
    while total < 1_000_000:
        total += len(os.read(read, 1 << 20))
    os.close(read)
    os.close(write)


def test_a_reader_who_left_costs_the_line_and_nothing_else() -> None:
    read, write = os.pipe()
    os.close(read)
    writer = LineWriter(write)
    writer.write("lost\n")
    writer.drain()
    writer.write("lost too\n")
    writer.drain()
    assert writer.dropped == 0
    os.close(write)
