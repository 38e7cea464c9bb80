"""The thread that writes log lines: in order, without blocking, bounded, and drained at the end."""

import os
import threading
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


def test_while_the_reader_has_stopped_lines_are_dropped_and_the_writer_does_not_block() -> None:
    read, write = os.pipe()
    writer = LineWriter(write, max_lines=10)
    line_bytes, lines = 1_000_000, 50
    for _ in range(lines):
        writer.write("x" * line_bytes)
    writer.drain(timeout_s=0.05)

    # When the reader continues, it gets the lines that waited: at most one batch and a full queue.
    seen = 0

    def read_all() -> None:
        nonlocal seen
        while data := os.read(read, 1 << 20):
            seen += len(data)

    reader = threading.Thread(target=read_all)
    reader.start()
    writer.drain(timeout_s=30)
    os.close(write)
    reader.join()
    os.close(read)
    assert line_bytes <= seen <= 2 * 10 * line_bytes
    assert seen % line_bytes == 0


def test_after_the_reader_has_closed_the_pipe_the_writer_goes_on() -> None:
    read, write = os.pipe()
    os.close(read)
    writer = LineWriter(write)
    for _ in range(2):
        writer.write("lost\n")
        started = time.monotonic()
        writer.drain(timeout_s=30)
        assert time.monotonic() - started < 30
    os.close(write)
