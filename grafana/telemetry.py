"""Is the telemetry itself sound? Queues and drops in process and collector, records, the event loop."""

from typing import Final

from grafana_foundation_sdk.models import dashboard

from grafana import standard
from grafana.panels import (
    HALF,
    RED_FROM_ONE,
    THIRD,
    Query,
    Words,
    graph,
    increase,
    log_lines,
    number,
    page,
    rate,
    timeline,
    zeroed,
)
from grafana.series import FAILED, bucket, by, value
from service.telemetry import names
from service.telemetry.names import Metric

SERVICE_PAGE: Final = ("Are users hurting?", "/d/llmops-service?${__url_time_range}&${service:queryparam}")
_DROPPING: Final = {
    "spans": standard.SDK_SPANS,
    "log records": standard.SDK_LOGS,
    "spans, export": standard.SDK_SPANS_EXPORTED,
    "log records, export": standard.SDK_LOGS_EXPORTED,
    "points, export": standard.SDK_POINTS_EXPORTED,
}


def collector(series: str, *labels: str, inside: str = "") -> str:
    """Return a selector of one of the collector's own series."""
    known = standard.COLLECTOR[series]
    if unknown := set(labels) - set(known):
        raise LookupError(f"{series} has no label {unknown}")
    return f'{series}{{job="collector"{inside}}}'


def _items(what: str) -> list[Query]:
    return [
        Query(zeroed(f"sum({rate(collector(f'otelcol_{what}_{item}_total'))})"), item.replace("_", " "))
        for item in ("spans", "log_records", "metric_points")
    ]


def _lost(what: str) -> list[Query]:
    return [
        Query(
            zeroed(f"sum({rate(collector(f'otelcol_{what}_{item}_total'))})"),
            f"{legend} {item.replace('_', ' ')}",
        )
        for item in ("spans", "log_records", "metric_points")
        for legend in (what.split("_", 1)[1].replace("_", " "),)
    ]


def _fill(size: Metric, capacity: Metric) -> str:
    return zeroed(f"max({value(size)} / {value(capacity)})")


def telemetry() -> dashboard.Dashboard:
    """Is the telemetry sound: what processes and collector drop, what waits, what MLflow does not have."""
    dropped = " + ".join(
        f"(sum({increase(value(metric, error_type=FAILED))}) or vector(0))" for metric in _DROPPING.values()
    )
    refused = " + ".join(
        f"(sum({increase(collector(f'otelcol_{what}_{item}_total'))}) or vector(0))"
        for what in ("receiver_refused", "receiver_failed", "exporter_send_failed", "exporter_enqueue_failed")
        for item in ("spans", "log_records", "metric_points")
    )
    sums = [
        number(
            Words(
                "Dropped by the service",
                "Spans, log records and points that a process gave up: its queue was full, or the export"
                " failed.",
                "is the collector up? If so, its queue and the export time below. No request ever waits"
                " for this.",
            ),
            Query(dropped, ""),
            unit="short",
            decimals=0,
            thresholds=RED_FROM_ONE,
            links=[SERVICE_PAGE],
        ),
        number(
            Words(
                "Refused or lost by the collector",
                "What the collector did not take, or could not deliver and gave up.",
                "refused: its memory limit; failed: the backend refuses, its log says why.",
            ),
            Query(refused, ""),
            unit="short",
            decimals=0,
            thresholds=RED_FROM_ONE,
            links=[SERVICE_PAGE],
        ),
        number(
            Words(
                "Records lost",
                "Records of model calls that MLflow will never get.",
                "the spool was full or too old (SPOOL_MAX_BYTES, SPOOL_MAX_AGE_S), or its disk is.",
            ),
            Query(zeroed(f"sum({increase(value(names.RECORDER_LOST))})"), ""),
            unit="short",
            decimals=0,
            thresholds=RED_FROM_ONE,
            links=[SERVICE_PAGE],
        ),
        number(
            Words(
                "Event loop lag (p99)",
                "How late the event loop wakes a sleeper; everything in the process waits that long.",
                "something blocks it: a profile of the process (py-spy) shows what.",
            ),
            Query(
                zeroed(
                    "histogram_quantile(0.99, sum by (le)"
                    f" (increase({bucket(names.EVENT_LOOP_LAG)}[$__range]))) >= 0"
                ),
                "",
            ),
            unit="s",
            decimals=3,
            thresholds=((None, "green"), (0.1, "orange"), (0.25, "red")),
            links=[SERVICE_PAGE],
        ),
    ]
    process = [
        graph(
            Words(
                "Dropped, by signal",
                "What processes dropped per second, and on which way: before the queue, or at the export.",
                "at the queue: the process makes more than it can send; at the export: the collector does"
                " not answer.",
            ),
            [
                Query(zeroed(f"sum({rate(value(metric, error_type=FAILED))})"), signal)
                for signal, metric in _DROPPING.items()
            ],
            unit="ops",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Queues of the processes",
                "How full the fullest queue of spans and of log records is.",
                "near 100 % the next ones are dropped: OTEL_BSP_MAX_QUEUE_SIZE, OTEL_BLRP_MAX_QUEUE_SIZE,"
                " or the collector.",
            ),
            [
                Query(_fill(standard.SDK_SPAN_QUEUE, standard.SDK_SPAN_QUEUE_CAPACITY), "spans"),
                Query(_fill(standard.SDK_LOG_QUEUE, standard.SDK_LOG_QUEUE_CAPACITY), "log records"),
            ],
            unit="percentunit",
            width=THIRD,
            thresholds=((None, "transparent"), (0.8, "red")),
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Export time: p95",
                "How long the service's exports to the collector take.",
                "seconds: the collector is busy or far away; requests do not wait for it, the queues above"
                " do.",
            ),
            [
                Query(
                    zeroed(
                        "histogram_quantile(0.95, sum by"
                        f" ({by(standard.SDK_EXPORT_DURATION, 'otel.component.name')}, le)"
                        f" ({rate(bucket(standard.SDK_EXPORT_DURATION))})) >= 0"
                    ),
                    "{{otel_component_name}}",
                )
            ],
            unit="s",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
    ]
    collecting = [
        timeline(
            Words(
                "What can be scraped",
                "Whether Prometheus reaches the collector, itself, Tempo, Loki and Grafana.",
                "`docker compose ps` and the logs of the one that is down. Without the collector"
                " everything else here"
                " stands still.",
            ),
            Query("min by (job) (up)", "{{job}}"),
            [(0, "down", "red"), (1, "up", "green")],
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Into the collector",
                "Spans, log records and points that it took, per second.",
                "0 while the service is busy: the service cannot reach it (OTEL_EXPORTER_OTLP_ENDPOINT).",
            ),
            _items("receiver_accepted"),
            unit="ops",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Out of the collector",
                "What it delivered, per second. Fewer spans than came in is tail sampling.",
                "log records or points below what comes in: a queue fills, see beside.",
            ),
            _items("exporter_sent"),
            unit="ops",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Lost in the collector",
                "What it refused, could not queue, or could not deliver and gave up, per second.",
                "refused: memory limit; enqueue failed: a full queue; send failed: the backend says no,"
                " see its log.",
            ),
            [*_lost("receiver_refused"), *_lost("exporter_send_failed"), *_lost("exporter_enqueue_failed")],
            unit="ops",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Queues of the collector",
                "How full the queue to each backend is; it is on disk and outlives a restart.",
                "above half: the backend is away or too slow; when it is full, the newest is lost.",
            ),
            [
                Query(
                    zeroed(
                        "max by (exporter, data_type)"
                        f" ({collector('otelcol_exporter_queue_size', 'exporter', 'data_type')}"
                        f" / {collector('otelcol_exporter_queue_capacity')})"
                    ),
                    "{{exporter}} {{data_type}}",
                )
            ],
            unit="percentunit",
            width=THIRD,
            thresholds=((None, "transparent"), (0.5, "red")),
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Tail sampling",
                "Traces per second that were kept, not kept, and forgotten before the decision.",
                "“forgotten”: more traces at once than num_traces; what is not kept has no error, no"
                " retry, and was fast.",
            ),
            [
                Query(
                    zeroed(
                        "sum("
                        + rate(
                            collector(
                                "otelcol_processor_tail_sampling_global_count_traces_sampled_total",
                                "sampled",
                                inside=f', sampled="{sampled}"',
                            )
                        )
                        + ")"
                    ),
                    legend,
                )
                for sampled, legend in (("true", "kept"), ("false", "not kept"))
            ]
            + [
                Query(
                    zeroed(
                        "sum("
                        + rate(
                            collector(
                                "otelcol_processor_tail_sampling_sampling_trace_dropped_too_early_total"
                            )
                        )
                        + ")"
                    ),
                    "forgotten",
                )
            ],
            unit="ops",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Memory of the collector",
                "Its resident memory. It refuses work from 384 MiB on, and its container ends at 768 MiB.",
                "near the limit: fewer traces at once (num_traces), or a bigger container and limit.",
            ),
            [Query(zeroed(f"max({collector('otelcol_process_memory_rss_bytes')})"), "resident")],
            unit="bytes",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
    ]
    recording = [
        graph(
            Words(
                "Records that wait for MLflow",
                "Records of model calls that MLflow does not have yet, and those that had to wait or were"
                " brought on.",
                "is mlflow up (“Whose fault is it?”)? They wait on disk, and follow by themselves when it"
                " is back.",
            ),
            [
                Query(zeroed(f"sum({value(names.RECORDER_QUEUE)})"), "waiting"),
                Query(zeroed(f"sum({rate(value(names.RECORDER_SPOOLED))})"), "had to wait /s"),
                Query(zeroed(f"sum({rate(value(names.RECORDER_REPLAYED))})"), "brought on /s"),
                Query(zeroed(f"sum({rate(value(names.RECORDER_LOST))})"), "lost /s"),
            ],
            unit="short",
            width=HALF,
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Event loop lag",
                "How late the event loop wakes a sleeper: half of the time, and 99 % of the time, less"
                " than this.",
                "compare with the latency of calls at the same moment: they wait just as long.",
            ),
            [
                Query(
                    zeroed(
                        f"histogram_quantile({quantile}, sum by (le)"
                        f" ({rate(bucket(names.EVENT_LOOP_LAG))})) >= 0"
                    ),
                    f"p{quantile * 100:g}",
                )
                for quantile in (0.5, 0.99)
            ],
            unit="s",
            width=HALF,
            thresholds=((None, "transparent"), (0.25, "red")),
            links=[SERVICE_PAGE],
        ),
        log_lines(
            Words(
                "What the recorder and the stop said",
                "Records that had to wait or were brought on, and the steps of each stop.",
                "`llmops.recorder.spooled` says why MLflow did not take them.",
            ),
            '{service_name=~"$service"} | event_name=~"llmops\\\\.(recorder|shutdown)\\\\..*"',
            links=[SERVICE_PAGE],
        ),
    ]
    return page(
        "llmops-telemetry",
        "Telemetry: is it sound?",
        "What is dropped, what waits, and whether the stack itself is up.",
        [
            ("Sums", sums),
            ("In the service", process),
            ("In the collector", collecting),
            ("Records and event loop", recording),
        ],
    )
