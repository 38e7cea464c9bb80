"""Every instrument of our own, made once from its declaration in ``names``."""

from opentelemetry.metrics import Counter, Histogram, Meter

from service.telemetry import names


class Instruments:
    """The instruments; counters stand at 0 from the start where their attributes are known."""

    def __init__(self, meter: Meter) -> None:
        self.llm_calls = _counter(meter, names.LLM_CALLS)
        self.llm_cost = _counter(meter, names.LLM_COST)
        self.auth_attempts = _counter(meter, names.AUTH_ATTEMPTS)
        self.requests_rejected = _counter(meter, names.REQUESTS_REJECTED)
        self.event_loop_lag = _histogram(meter, names.EVENT_LOOP_LAG)
        for counter, metric, attribute in (
            (self.auth_attempts, names.AUTH_ATTEMPTS, "outcome"),
            (self.requests_rejected, names.REQUESTS_REJECTED, "reason"),
        ):
            for value in metric.attributes[attribute]:
                counter.add(0, {attribute: value})

    def expect_model(self, model: str) -> None:
        """Let the model's series start at 0, so that ``rate()`` sees its first call."""
        for outcome in names.LLM_CALLS.attributes["outcome"]:
            if outcome != "error":
                self.llm_calls.add(0, {"model": model, "outcome": outcome})
        self.llm_cost.add(0, {"model": model})


def _counter(meter: Meter, metric: names.Metric) -> Counter:
    return meter.create_counter(metric.name, metric.unit, metric.description)


def _histogram(meter: Meter, metric: names.Metric) -> Histogram:
    return meter.create_histogram(
        metric.name,
        metric.unit,
        metric.description,
        explicit_bucket_boundaries_advisory=list(metric.buckets) or None,
    )
