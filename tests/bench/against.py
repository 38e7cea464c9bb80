"""This tree beside another one of the same service, in turns: `python -m tests.bench.against OTHER`.

OTHER is a checkout with an environment of its own in `.venv`. Both run with everything on but the cache; what
is printed are ratios round by round, this tree over the other. Calls come with an API key where the tree has
them.
"""

import argparse
import tempfile
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path

from tests.bench import sides as make
from tests.bench.__main__ import in_turns, ratios, spread
from tests.bench.http_load import Load
from tests.bench.upstream import upstream
from tests.harness import ServiceProcess
from tests.valkey import Valkey


def secret(process: ServiceProcess) -> str:
    """An API key; a token where the tree knows no keys."""
    token = process.token()
    made = process.call("POST", "/keys", body={"name": "bench"}, token=token)
    return str(made.json["key"]) if made.status == HTTPStatus.CREATED else token


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each side's turn")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--valkey", action="store_true", help="this tree counts in a Valkey server")
    asked = parser.parse_args()
    here = Path(__file__).resolve().parents[2]
    other = asked.other.resolve()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        port, load = stack.enter_context(upstream()), stack.enter_context(Load())
        sides: list[make.Side] = []
        for tree in (other, here):
            on = {**make.everything_on(stack, port, Path(name)), "CACHE_ENABLED": "false"}
            if asked.valkey and sides:
                on["VALKEY_URL"] = stack.enter_context(Valkey()).url
            sides.append(make.service(stack, str(tree), on, secret_of=secret, tree=tree))
            sides[-1].ask(load, asked.connections, asked.seconds)
        before, after = in_turns(load, sides, asked.connections, asked.rounds, asked.seconds)
        memory = [side.rss_mib for side in sides]
    for what, mine, its in (
        ("throughput", after.rates, before.rates),
        ("CPU of a request", after.cpu_us, before.cpu_us),
        ("p50", after.p50_ms, before.p50_ms),
        ("p99", after.p99_ms, before.p99_ms),
    ):
        print(f"{what}: {spread(ratios(mine, its))}; here {spread(mine, 1)}, there {spread(its, 1)}")  # noqa: T201 - what the command is for

    print(f"memory: {memory[1] / memory[0]:.2f}; here {memory[1]:.0f} MiB, there {memory[0]:.0f} MiB")  # noqa: T201 - as above


if __name__ == "__main__":
    main()
