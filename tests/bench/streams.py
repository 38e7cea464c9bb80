"""What many streams at once cost: `python -m tests.bench.streams`.

Many streams are held open at once, each with a piece every so often. Every piece is counted, and the
service's memory is printed. What the service adds to one stream, `python -m tests.bench` says.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.streams import DONE, chunk, text, usage
from tests.harness import ServiceProcess

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
MODELS = b'{"object":"list","data":[{"id":"demo","object":"model"}]}'
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
END = b"0\r\n\r\n"
LONGEST_S = 300.0


def _in_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def _converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer requests on one connection; a prompt says how many pieces it wants, and how far apart."""
    # asyncio leaves Nagle's algorithm on for a listener that it did not make: 40 ms an answer.
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"POST"):
                writer.write(PLAIN % (len(MODELS), MODELS))
                continue
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            asked = json.loads(await reader.readexactly(length))
            pieces, interval_s = json.loads(asked["messages"][0]["content"])
            writer.write(HEAD)
            began = time.monotonic()
            for number in range(pieces):
                writer.write(_in_chunk(text(f"{number} ")))
                await writer.drain()
                # By the clock, so that a delay is caught up with.
                await asyncio.sleep(max(0.0, began + (number + 1) * interval_s - time.monotonic()))
            rest = (chunk(reason="stop"), usage(pieces, pieces), DONE)
            writer.write(b"".join(map(_in_chunk, rest)) + END)
    except (asyncio.IncompleteReadError, OSError):
        writer.close()


def _serve(listener: socket.socket) -> None:
    async def main() -> None:
        server = await asyncio.start_server(_converse, sock=listener)
        await server.serve_forever()

    asyncio.run(main())


@contextmanager
def scripted() -> Iterator[int]:
    """The scripted upstream in a process of its own; its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=1_000) as listener:
        process = multiprocessing.get_context("fork").Process(target=_serve, args=(listener,))
        process.start()
        try:
            yield listener.getsockname()[1]
        finally:
            process.terminate()
            process.join()


@dataclass(frozen=True)
class Heard:
    """One stream as it was read: the seconds to its first piece, and all of it."""

    first_s: float
    body: bytes


async def listen(port: int, key: str, prompt: str) -> Heard:
    """Ask for one stream, and read it to its end."""
    body = json.dumps(
        {"model": "demo", "stream": True, "messages": [{"role": "user", "content": prompt}]}
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        asked_s = time.perf_counter()
        writer.write(head.encode() + body)
        await reader.readuntil(b"\r\n\r\n")
        read = await reader.read(65_536)
        first_s = time.perf_counter() - asked_s
        while not read.endswith(END) and (piece := await reader.read(65_536)):
            read += piece
    finally:
        writer.close()
    return Heard(first_s, read)


def _memory_mb(pid: int, field: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) / 1_024


async def crowd(service: ServiceProcess, streams: int, pieces: int, interval_s: float) -> None:
    """Hold so many streams open at once, and say how many pieces came and what memory it took."""
    assert service.process is not None
    token, pid = service.token(), service.process.pid
    prompt, before_mb = json.dumps([pieces, interval_s]), _memory_mb(pid, "VmRSS")
    halves: list[float] = []

    async def watch() -> None:
        for _ in range(2):
            await asyncio.sleep(pieces * interval_s * 0.4)
            halves.append(_memory_mb(pid, "VmRSS"))

    watching = asyncio.create_task(watch())
    began = time.monotonic()
    async with asyncio.timeout(LONGEST_S):
        heard = await asyncio.gather(*(listen(service.port, token, prompt) for _ in range(streams)))
    took_s = time.monotonic() - began
    await watching
    came = sum(one.body.count(b'"content": "') for one in heard)
    whole = sum(one.body.count(DONE) for one in heard)
    first_s = sorted(one.first_s for one in heard)
    ideal_s = pieces * interval_s
    peak_mb = _memory_mb(pid, "VmHWM")
    _say(f"  {whole} of {streams} streams whole, {came} of {streams * pieces} pieces")
    _say(f"  {took_s:.1f} s, at best {ideal_s:.1f} s")
    _say(f"  first piece: median {statistics.median(first_s):.2f} s, last {first_s[-1]:.2f} s")
    _say(f"  memory of the service: {before_mb:.0f} MB before, {peak_mb:.0f} MB at most")
    _say(f"  on the way: {halves[0]:.0f} MB, then {halves[1]:.0f} MB")
    if (whole, came) != (streams, streams * pieces):
        raise SystemExit("pieces were lost")


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - what the command is for


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--per-second", type=float, default=20.0, help="pieces of each stream")
    arguments = parser.parse_args()
    variables = {
        "MAX_IN_FLIGHT": "600",
        "MAX_IN_FLIGHT_PER_USER": "600",
        "RATE_LIMIT": "1000000/minute",
        "LOG_LEVEL": "WARNING",
    }
    with scripted() as port:
        variables["LITELLM_URL"] = f"http://127.0.0.1:{port}"
        with ServiceProcess(variables) as process:
            process.wait_ready()
            _say(f"{arguments.streams} streams at once, {arguments.per_second:g} pieces a second each:")
            pieces = int(arguments.seconds * arguments.per_second)
            asyncio.run(crowd(process, arguments.streams, pieces, 1 / arguments.per_second))


if __name__ == "__main__":
    main()
