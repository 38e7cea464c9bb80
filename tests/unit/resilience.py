"""What the tests of breaker and retry share: instruments whose values can be read."""

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint

from service.telemetry.instruments import Instruments


class Readable:
    """Instruments and their values."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self._provider = MeterProvider([self._reader], shutdown_on_exit=False)
        self.instruments = Instruments(self._provider.get_meter("test"))

    def value(self, name: str, **attributes: str) -> float:
        """The sum over the points with these attributes (two underscores stand for a dot).

        Of a histogram it is the number of measurements.
        """
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}
        data = self._reader.get_metrics_data()
        return sum(
            point.value if isinstance(point, NumberDataPoint) else point.count
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
            if isinstance(point, NumberDataPoint | HistogramDataPoint)
            and wanted.items() <= dict(point.attributes or {}).items()
        )

    def close(self) -> None:
        """Stop the provider."""
        self._provider.shutdown()


@contextmanager
def readable() -> Iterator[Readable]:
    """Instruments for the time of a block."""
    metrics = Readable()
    try:
        yield metrics
    finally:
        metrics.close()
