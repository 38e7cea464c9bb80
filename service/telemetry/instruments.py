"""Creates all instruments of this service from their declarations in ``names``."""

import itertools
from collections.abc import Callable, Iterator, Mapping

from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Meter, Observation, UpDownCounter
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE

from service.telemetry import names
from service.telemetry.tally import TallyCounter, TallyUpDownCounter


class Instruments:
    """The instruments. Counters start at 0 for each combination of attribute values that is known."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._breakers: dict[frozenset[tuple[str, str]], Callable[[], str]] = {}
        self.llm_calls = _counter(meter, names.LLM_CALLS)
        self.llm_cost = _counter(meter, names.LLM_COST)
        self.llm_first_chunk = _histogram(meter, names.LLM_FIRST_CHUNK)
        self.retry_attempts = _counter(meter, names.RETRY_ATTEMPTS)
        self.breaker_transitions = _counter(meter, names.BREAKER_TRANSITIONS)
        self.breaker_rejections = _counter(meter, names.BREAKER_REJECTIONS)
        self.cache_lookups = _counter(meter, names.CACHE_LOOKUPS)
        self.cache_lookup_duration = _histogram(meter, names.CACHE_LOOKUP_DURATION)
        self.cache_similarity = _histogram(meter, names.CACHE_SIMILARITY)
        self.cache_saved_tokens = _counter(meter, names.CACHE_SAVED_TOKENS)
        self.cache_saved_cost = _counter(meter, names.CACHE_SAVED_COST)
        self.cache_writes = _counter(meter, names.CACHE_WRITES)
        self.requests_in_flight = _up_down_counter(meter, names.REQUESTS_IN_FLIGHT)
        self.requests_rejected = _counter(meter, names.REQUESTS_REJECTED)
        self.auth_attempts = _counter(meter, names.AUTH_ATTEMPTS)
        self.budget_exceeded = _counter(meter, names.BUDGET_EXCEEDED)
        self.budget_near_limit = _counter(meter, names.BUDGET_NEAR_LIMIT)
        self.budget_unpriced = _counter(meter, names.BUDGET_UNPRICED)
        self.identity_store_duration = _histogram(meter, names.IDENTITY_STORE_DURATION)
        self.shared_news = _counter(meter, names.SHARED_NEWS)
        self.shared_leases = _counter(meter, names.SHARED_LEASES)
        self.shared_operation_duration = _histogram(meter, names.SHARED_OPERATION_DURATION)
        self.health_check_duration = _histogram(meter, names.HEALTH_CHECK_DURATION)
        self.recorder_spooled = _counter(meter, names.RECORDER_SPOOLED)
        self.recorder_replayed = _counter(meter, names.RECORDER_REPLAYED)
        self.recorder_lost = _counter(meter, names.RECORDER_LOST)
        self.event_loop_lag = _histogram(meter, names.EVENT_LOOP_LAG)
        for counter, metric in (
            (self.retry_attempts, names.RETRY_ATTEMPTS),
            (self.breaker_transitions, names.BREAKER_TRANSITIONS),
            (self.breaker_rejections, names.BREAKER_REJECTIONS),
            (self.cache_lookups, names.CACHE_LOOKUPS),
            (self.cache_saved_tokens, names.CACHE_SAVED_TOKENS),
            (self.cache_saved_cost, names.CACHE_SAVED_COST),
            (self.cache_writes, names.CACHE_WRITES),
            (self.requests_rejected, names.REQUESTS_REJECTED),
            (self.auth_attempts, names.AUTH_ATTEMPTS),
            (self.budget_exceeded, names.BUDGET_EXCEEDED),
            (self.budget_near_limit, names.BUDGET_NEAR_LIMIT),
            (self.budget_unpriced, names.BUDGET_UNPRICED),
            (self.recorder_spooled, names.RECORDER_SPOOLED),
            (self.recorder_replayed, names.RECORDER_REPLAYED),
            (self.recorder_lost, names.RECORDER_LOST),
            (self.shared_news, names.SHARED_NEWS),
            (self.shared_leases, names.SHARED_LEASES),
        ):
            _start_at_zero(counter, metric)
        self.requests_in_flight.add(0)

    def observe_breaker(self, labels: Mapping[str, str], state: Callable[[], str]) -> None:
        """Observe a breaker's state: one series per state, 1 for the current state and 0 for the others."""
        # One gauge for all breakers: of two gauges with the same name the SDK reads only one.
        if not self._breakers:
            metric = names.BREAKER_STATE
            self._meter.create_observable_gauge(
                metric.name, [self._breaker_states], metric.unit, metric.description
            )
        self._breakers[frozenset(labels.items())] = state

    def _breaker_states(self, _options: CallbackOptions) -> Iterator[Observation]:
        for labels, state in list(self._breakers.items()):
            current = state()
            for value in names.BREAKER_STATE.attributes["state"]:
                yield Observation(int(value == current), {**dict(labels), "state": value})

    def start_circuit_at_zero(self, labels: Mapping[str, str]) -> None:
        """Start the series of a model's circuit at 0, so that ``rate()`` includes its first opening."""
        self.breaker_rejections.add(0, dict(labels))
        for state in names.BREAKER_TRANSITIONS.attributes["to"]:
            self.breaker_transitions.add(0, {**labels, "to": state})

    def observe_open_callers(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Observe for each model how many callers' own circuits are open."""
        metric = names.BREAKER_OPEN_CALLERS

        def observe(_options: CallbackOptions) -> Iterator[Observation]:
            for model, number in counts().items():
                yield Observation(number, {"model": model})

        self._meter.create_observable_gauge(metric.name, [observe], metric.unit, metric.description)

    def observe_health(self, statuses: Callable[[], Mapping[str, tuple[bool, float | None]]]) -> None:
        """Observe each dependency's status and the age of its latest result, None before the first result."""

        def observe_status(_options: CallbackOptions) -> Iterator[Observation]:
            for dependency, (up, _age_s) in statuses().items():
                yield Observation(int(up), {"dependency": dependency})

        def observe_age(_options: CallbackOptions) -> Iterator[Observation]:
            for dependency, (_up, age_s) in statuses().items():
                if age_s is not None:
                    yield Observation(age_s, {"dependency": dependency})

        for metric, observe in ((names.HEALTH_STATUS, observe_status), (names.HEALTH_AGE, observe_age)):
            self._meter.create_observable_gauge(metric.name, [observe], metric.unit, metric.description)

    def observe_recorder_queue(self, waiting: Callable[[], int]) -> None:
        """Observe how many records have not been delivered to MLflow."""
        metric = names.RECORDER_QUEUE
        self._meter.create_observable_gauge(
            metric.name, [lambda _options: [Observation(waiting())]], metric.unit, metric.description
        )

    def observe_fallback(self, falls_back: Callable[[], bool]) -> None:
        """Observe whether limits are counted per process because Valkey cannot be had."""
        metric = names.SHARED_FALLBACK
        self._meter.create_observable_gauge(
            metric.name, [lambda _options: [Observation(int(falls_back()))]], metric.unit, metric.description
        )

    def start_model_at_zero(self, model: str) -> None:
        """Start the model's series at 0, so that ``rate()`` includes its first call."""
        for outcome in names.LLM_CALLS.attributes["outcome"]:
            if outcome != "error":
                self.llm_calls.add(0, {"model": model, "outcome": outcome})
        self.llm_cost.add(0, {"model": model})


def _start_at_zero(counter: Counter, metric: names.Metric) -> None:
    """Add 0 for each combination of known values, without ``error.type``, which only failures have."""
    closed = {
        name: values
        for name, values in metric.attributes.items()
        if not isinstance(values, str) and name != ERROR_TYPE
    }
    for values in itertools.product(*closed.values()):
        attributes = dict(zip(closed, values, strict=True))
        # A model's circuit has its series from its first failure on.
        if attributes.get("breaker") != names.MODEL_BREAKER:
            counter.add(0, attributes)


def _up_down_counter(meter: Meter, metric: names.Metric) -> UpDownCounter:
    return TallyUpDownCounter(meter, metric.name, metric.unit, metric.description)


def _counter(meter: Meter, metric: names.Metric) -> Counter:
    return TallyCounter(meter, metric.name, metric.unit, metric.description)


def _histogram(meter: Meter, metric: names.Metric) -> Histogram:
    return meter.create_histogram(
        metric.name,
        metric.unit,
        metric.description,
        explicit_bucket_boundaries_advisory=list(metric.buckets) or None,
    )
