"""What each panel must show after the mix, computed from what callers and upstreams saw."""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

from grafana.objectives import AVAILABILITY, LATENCY, SLOW_S
from grafana.parties import FAILURES, PARTIES
from service.telemetry import names
from tests.stack.api import Labels
from tests.stack.ledger import Entry
from tests.stack.queries import WINDOW_S
from tests.stack.traffic import Mix
from tests.stack.verdicts import AtLeast, Expected, Same, Within, labels

CALL_ROUTES: Final = ("/llm/generate", "/v1/chat/completions", "/v1/embeddings")
DATABASE_OPERATIONS: Final = ("book", "find", "keep", "poll", "purge")
"""Without `forget`: nobody deletes a stored response."""

NOTHING: Final = Same({})
ONE: Final = labels()


def per_second(counted: Mapping[Any, float], *names_: str) -> dict[Labels, float]:
    """Turn counts by tuples of values into rates by labels; an empty value is a label that is not there."""
    found: dict[Labels, float] = defaultdict(float)
    for values, number in counted.items():
        key = frozenset((name, value) for name, value in zip(names_, values, strict=True) if value)
        found[key] += number / WINDOW_S
    return dict(found)


def quantile_within(
    seconds: Iterable[float], quantile: float, bounds: tuple[float, ...]
) -> tuple[float, float]:
    """Bounds of a quantile as a histogram can know it: its bucket, and one to each side for the way there.

    A caller who is held up measures more than the service, by any amount: the fastest one decides how low it
    may be.
    """
    ordered = sorted(seconds)
    at = ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]
    fastest, place = bisect_left(bounds, ordered[0]), bisect_left(bounds, at)
    edges = (0.0, *bounds, bounds[-1])
    return edges[max(0, fastest - 1)], edges[min(len(edges) - 1, place + 2)]


class Expectations:
    """The expectations of one run."""

    def __init__(self, mix: Mix) -> None:
        self._mix = mix
        ledger = mix.ledger
        self._all = ledger.entries
        self._served = [entry for entry in self._all if entry.route]
        self._failed = [entry for entry in self._served if entry.error in FAILURES]
        self._calls = list(ledger.calls())
        self._asked = [entry for entry in self._all if entry.route in CALL_ROUTES]
        self._answered = [entry for entry in self._asked if not entry.error]
        self._slow = [entry for entry in self._answered if entry.seconds > SLOW_S]
        self._streams = [entry for entry in self._calls if entry.first_piece_s is not None]

    def failure_ratio(self) -> float:
        """The share of requests that failed."""
        return len(self._failed) / len(self._served)

    def slow_ratio(self) -> float:
        """The share of answered calls that were slow."""
        return len(self._slow) / len(self._answered)

    def table(self) -> dict[str, Expected]:
        """Each query's name and what it should answer."""
        return {**self._service(), **self._dependencies(), **self._llm(), **self._telemetry()}

    def _service(self) -> dict[str, Expected]:
        statuses = Counter((str(entry.status),) for entry in self._served)
        errors = Counter((entry.error,) for entry in self._all if entry.error)
        latency = {
            f"service: Latency of model calls {letter}": Within(
                {
                    ONE: quantile_within(
                        (entry.seconds for entry in self._asked), quantile, names.HTTP_DURATION_BUCKETS
                    )
                }
            )
            for letter, quantile in (("A", 0.5), ("B", 0.95), ("C", 0.99))
        }
        first = {
            f"service: Time to first piece {letter}": Within(
                {
                    ONE: quantile_within(
                        (entry.first_piece_s or 0 for entry in self._streams),
                        quantile,
                        names.LLM_FIRST_CHUNK.buckets,
                    )
                }
            )
            for letter, quantile in (("A", 0.5), ("B", 0.95))
        }
        burn = {
            f"service: Burn rate {letter}": Same({ONE: ratio / budget})
            for letter, ratio, budget in (
                ("A", self.failure_ratio(), AVAILABILITY.budget),
                ("B", self.failure_ratio(), AVAILABILITY.budget),
                ("C", self.slow_ratio(), LATENCY.budget),
                ("D", self.slow_ratio(), LATENCY.budget),
            )
        }
        return {
            "service: Availability A": Same({ONE: 1 - self.failure_ratio()}),
            "service: Availability budget left A": Same(
                {ONE: 1 - self.failure_ratio() / AVAILABILITY.budget}
            ),
            f"service: Calls within {SLOW_S} s A": Same({ONE: 1 - self.slow_ratio()}),
            "service: Latency budget left A": Same({ONE: 1 - self.slow_ratio() / LATENCY.budget}, 0.1),
            "service: Requests by status A": Same(per_second(statuses, "http_response_status_code")),
            "service: Errors by name A": Same(per_second(errors, "error_type")),
            **latency,
            **first,
            **burn,
            "service: In flight, and turned away A": Same({ONE: 0.0}),
            "service: In flight, and turned away B": Same(per_second(self._rejections(), "reason")),
            "service: Sign-ins A": Same(per_second(self._sign_ins(), "outcome")),
            # A token that is none, and a key with a wrong checksum; without either, nobody tries.
            "service: Refused tokens and keys A": Same(
                per_second({("token", "invalid"): 1, ("key", "invalid"): 1}, "method", "outcome")
            ),
            "service: Bugs A": Same({ONE: float(errors["InternalError",])}),
        }

    def _rejections(self) -> Counter[tuple[str, ...]]:
        found: Counter[tuple[str, ...]] = Counter()
        for error, reason in (
            ("OverloadedError", "overloaded"),
            ("ShuttingDownError", "draining"),
            ("PayloadTooLargeError", "too_large"),
        ):
            found[reason,] = sum(entry.error == error for entry in self._all)
        # The upstream's own 429 has the same name, and was an attempt.
        found["rate_limited",] = sum(
            entry.error == "RateLimitError" and entry.route in CALL_ROUTES and not entry.attempts
            for entry in self._all
        )
        return found

    def _sign_ins(self) -> Counter[tuple[str, ...]]:
        outcomes = {
            "": "success",
            "AuthenticationError": "wrong_credentials",
            "RateLimitError": "rate_limited",
        }
        return Counter((outcomes[entry.error],) for entry in self._all if entry.route == "/auth/login")

    def _dependencies(self) -> dict[str, Expected]:
        fault = {
            f"dependencies: Whose fault {letter}": Same(
                {ONE: sum(entry.error in found for entry in self._all) / WINDOW_S}
            )
            for letter, found in zip("ABC", PARTIES.values(), strict=True)
        }
        attempts = sum(entry.attempts for entry in self._calls)
        uncached = sum(not entry.cached for entry in self._calls)
        left = sum(entry.outcome == "cancelled" and not entry.streamed for entry in self._calls)
        rejected = sum(entry.error == "CircuitOpenError" for entry in self._all)
        looked_up = Counter(
            (entry.cache,) for entry in self._calls if entry.cache and entry.operation == "chat"
        )
        dependencies = names.HEALTH_STATUS.attributes["dependency"]
        checks = {
            labels(dependency=one): (0.0, 15.0)
            for one in dependencies
            if one not in {"mlflow", "oidc", "valkey"}
        }
        with_mlflow = {**checks, labels(dependency="mlflow"): (0.0, 15.0)}
        return {
            **fault,
            "dependencies: Attempts by what came after A": Same(
                per_second(self._after_attempts(), "outcome")
            ),
            "dependencies: Failed attempts by error A": Same(
                per_second(self._failed_attempts(), "error_type")
            ),
            # An attempt whose caller left before the answer has no outcome: nothing came after it.
            "dependencies: Attempts per call A": Same({ONE: (attempts - left) / uncached}),
            "dependencies: Turned away by the breaker A": Same({ONE: float(rejected)}),
            "dependencies: Breakers A": Same(
                {labels(breaker="litellm"): 0.0, labels(breaker="model", model="demo"): 0.0}
            ),
            "dependencies: Dependencies A": Same(dict.fromkeys(with_mlflow, 1.0)),
            "dependencies: Changes of the breakers A": Same(
                {
                    labels(breaker="litellm", to="open"): 1.0,
                    labels(breaker="litellm", to="half_open"): 1.0,
                    labels(breaker="litellm", to="closed"): 1.0,
                    # Two callers' circuits and the model's; one caller's probe closes all three.
                    labels(breaker="model", to="open"): 3.0,
                    labels(breaker="model", to="half_open"): 2.0,
                    labels(breaker="model", to="closed"): 3.0,
                }
            ),
            "dependencies: Callers turned away from a model A": Same({labels(model="demo"): 0.0}),
            "dependencies: Health checks A": Within(with_mlflow),
            "dependencies: Health checks B": Within(with_mlflow),
            "dependencies: Attempts at the model: p95 A": Within(
                {
                    labels(gen_ai_operation_name="chat"): (0.005, 20.0),
                    labels(gen_ai_operation_name="embeddings"): (0.0, 5.0),
                }
            ),
            "dependencies: HTTP behind us A": AtLeast(
                {
                    labels(server_address="127.0.0.1", http_response_status_code="200"): sum(
                        not entry.error for entry in self._calls
                    )
                    / WINDOW_S,
                    labels(server_address="127.0.0.1", http_response_status_code="429"): 4 / WINDOW_S,
                }
            ),
            "dependencies: Cache look-ups A": Same(
                {key | labels(kind="exact"): value for key, value in per_second(looked_up, "result").items()}
            ),
            "dependencies: Cache look-up time A": Within({labels(kind="exact"): (0.0, 2.0)}),
            "dependencies: Cache writes A": AtLeast({labels(outcome="stored"): 40 / WINDOW_S}),
            # How often depends on how long the processes run.
            "dependencies: Database transactions A": Within(
                {labels(operation=name, outcome="success"): (0.001, 10.0) for name in DATABASE_OPERATIONS}
            ),
            "dependencies: Database time A": Within(
                {labels(operation=name): (0.0001, 2.0) for name in DATABASE_OPERATIONS}
            ),
            # No Valkey takes part.
            "dependencies: Processes that count by themselves A": NOTHING,
            "dependencies: Wait for Valkey A": NOTHING,
            "dependencies: News between replicas A": NOTHING,
            "dependencies: Equal calls over replicas A": NOTHING,
        }

    def _after_attempts(self) -> Counter[tuple[str, ...]]:
        found: Counter[tuple[str, ...]] = Counter()
        for entry in self._calls:
            if entry.outcome == "cancelled" and entry.streamed:
                found["success",] += 1  # the attempt was answered; it is the caller who left
            if entry.outcome in {"cancelled", "cached"} or not entry.attempts:
                continue
            found["retried",] += entry.attempts - 1
            found[self._last(entry),] += 1
        return found

    @staticmethod
    def _last(entry: Entry) -> str:
        if entry.outcome == "success":
            return "success"
        # The same error, much earlier, is a connection that could not be made.
        if entry.error == "UpstreamTimeoutError" and entry.seconds > SLOW_S:
            return "deadline"
        if entry.error == "BadRequestError" or entry.attempts == 1:
            return "not_retryable"
        return "exhausted"

    def _failed_attempts(self) -> Counter[tuple[str, ...]]:
        """By error; a call that was answered at last had an upstream's errors before."""
        found: Counter[tuple[str, ...]] = Counter()
        for entry in self._calls:
            if entry.outcome == "success" and entry.attempts > 1:
                found["UpstreamError",] += entry.attempts - 1
            elif entry.outcome == "error":
                found[entry.error,] += entry.attempts
        return found

    def _llm(self) -> dict[str, Expected]:
        outcomes = Counter((entry.outcome,) for entry in self._calls)
        models = Counter((self._known(entry.model),) for entry in self._calls)
        errors = Counter(
            (self._known(entry.model), entry.error) for entry in self._calls if entry.outcome == "error"
        )
        cost: dict[tuple[str, ...], float] = defaultdict(float)
        inputs: Counter[tuple[str, ...]] = Counter()
        outputs: Counter[tuple[str, ...]] = Counter()
        for entry in self._calls:
            if entry.outcome == "success":
                cost[self._known(entry.model),] += entry.cost
                inputs[self._known(entry.model),] += entry.input_tokens
                outputs[self._known(entry.model),] += entry.output_tokens
        spent = sum(cost.values())
        hits = [entry for entry in self._calls if entry.cached]
        # What an answer from the cache had cost, the caller who asked first was told.
        asked = next(entry for entry in self._calls if entry.upstream == "fake" and entry.cost)
        misses = sum(entry.cache == "miss" for entry in self._calls)
        saved = float(sum(entry.input_tokens + entry.output_tokens for entry in hits))
        # A name that the list does not have is refused without an attempt.
        asked_for = {self._known(entry.model) for entry in self._calls if entry.attempts}
        by_model = {labels(gen_ai_request_model=model): (0.0, 30.0) for model in asked_for}
        first = {
            labels(model=model): quantile_within(
                [entry.first_piece_s or 0 for entry in self._streams if entry.model == model],
                0.95,
                names.LLM_FIRST_CHUNK.buckets,
            )
            for model in {entry.model for entry in self._streams}
        }
        return {
            "llm: Calls A": Same({ONE: float(len(self._calls))}),
            "llm: Cost A": Same({ONE: spent}, slack=0.0),
            "llm: Hits of the cache A": Same({ONE: len(hits) / (len(hits) + misses)}),
            "llm: Saved A": Same({ONE: len(hits) * asked.cost}, slack=0.0),
            "llm: Tokens saved A": Same({ONE: saved}),
            "llm: Calls by how they ended A": Same(per_second(outcomes, "outcome")),
            "llm: Calls by model A": Same(per_second(models, "model")),
            "llm: Errors by model A": Same(per_second(errors, "model", "error_type")),
            "llm: Tokens by model: input A": Same(per_second(inputs, "gen_ai_request_model")),
            "llm: Tokens by model: output A": Same(per_second(outputs, "gen_ai_request_model")),
            "llm: Cost by model A": Same(
                {key: value * 3_600 for key, value in per_second(cost, "model").items()}, slack=0.0
            ),
            "llm: Attempts by model: p95 A": Within(by_model),
            "llm: Time to first piece by model: p95 A": Within(first),
            "llm: Calls refused by a budget A": Same(
                per_second({("key",): sum(e.error == "BudgetExceededError" for e in self._all)}, "scope")
            ),
            "llm: Budgets that came near their limit A": Same({labels(scope="key"): 1.0}),
            "llm: Calls that a budget could not count A": Same(
                per_second({("key",): self._mix.ledger.facts["unpriced"]}, "scope")
            ),
            "llm: Likeness of semantic hits A": NOTHING,
            "llm: Saved by the cache A": Same({labels(kind="exact"): saved / WINDOW_S}),
        }

    @staticmethod
    def _known(model: str) -> str:
        return names.OTHER_MODEL if model == "no-such-model" else model

    def _telemetry(self) -> dict[str, Expected]:
        world = self._mix.world
        logs = len(world.loki.logs()) / WINDOW_S
        spans = len(world.tempo.spans()) / WINDOW_S
        waited = self._mix.ledger.facts["spooled"]
        # Scraped every 15 s, from a series' first item on: what its first scrape has already, a rate does not
        # see. The counters themselves are compared exactly, in `test_queries.py`.
        scraped = 0.7
        # A rate is extrapolated to the ends of its window, by half an interval of scrapes at most each.
        extrapolated = 1.2
        nothing_lost = {f"telemetry: Lost in the collector {letter}": NOTHING for letter in "ABCDEFGHI"}
        nothing_dropped = {f"telemetry: Dropped, by signal {letter}": NOTHING for letter in "ABCDE"}
        exporters = ("otlp_http_log_exporter/0", "otlp_http_metric_exporter/0", "otlp_http_span_exporter/0")
        queues = (
            ("logs", "otlp_http/loki"),
            ("metrics", "otlp_http/prometheus"),
            ("traces", "otlp_grpc/tempo"),
        )
        return {
            "telemetry: Dropped by the service A": NOTHING,
            "telemetry: Refused or lost by the collector A": NOTHING,
            "telemetry: Records lost A": NOTHING,
            "telemetry: Event loop lag (p99) A": Within({ONE: (0.0, 5.0)}),
            **nothing_dropped,
            "telemetry: Queues of the processes A": Within({ONE: (0.0, 0.5)}),
            "telemetry: Queues of the processes B": Within({ONE: (0.0, 0.5)}),
            "telemetry: Export time: p95 A": Within(
                {labels(otel_component_name=name): (0.0, 10.0) for name in exporters}
            ),
            "telemetry: What can be scraped A": Same(
                {labels(job="collector"): 1.0, labels(job="prometheus"): 1.0}
            ),
            "telemetry: Into the collector A": AtLeast({ONE: spans * (1 - scraped)}),
            "telemetry: Into the collector B": Within({ONE: (logs * (1 - scraped), logs * extrapolated)}),
            "telemetry: Into the collector C": AtLeast({ONE: 10.0}),
            "telemetry: Out of the collector A": Within({ONE: (spans * (1 - scraped), spans * extrapolated)}),
            "telemetry: Out of the collector B": Within({ONE: (logs * (1 - scraped), logs * extrapolated)}),
            "telemetry: Out of the collector C": AtLeast({ONE: 10.0}),
            **nothing_lost,
            "telemetry: Queues of the collector A": Within(
                {labels(data_type=kind, exporter=name): (0.0, 0.1) for kind, name in queues}
            ),
            "telemetry: Tail sampling A": AtLeast({ONE: 0.0}),
            "telemetry: Tail sampling B": AtLeast({ONE: 0.0}),
            "telemetry: Tail sampling C": NOTHING,
            "telemetry: Memory of the collector A": Within({ONE: (2e7, 4e8)}),
            "telemetry: Records that wait for MLflow A": NOTHING,
            "telemetry: Records that wait for MLflow B": AtLeast({ONE: waited / WINDOW_S}),
            "telemetry: Records that wait for MLflow C": AtLeast({ONE: waited / WINDOW_S}),
            "telemetry: Records that wait for MLflow D": NOTHING,
            "telemetry: Event loop lag A": Within({ONE: (0.0, 1.0)}),
            "telemetry: Event loop lag B": Within({ONE: (0.0, 5.0)}),
        }
