"""The dashboard "Is the telemetry sound?": queues and drops, the collector, records, the event loop."""

from typing import Final

from grafana_foundation_sdk.models import dashboard

from grafana import standard
from grafana.panels import (
    HALF,
    RED_FROM_ONE,
    THIRD,
    PanelText,
    Query,
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
    """Return a selector of one of the collector's own metrics."""
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
    """Return the dashboard: drops, queues, the collector, records that MLflow does not have yet."""
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
            PanelText(
                "Dropped by the service",
                "Spans, log records and metric points that a process dropped: its queue was full, or the "
                "export failed.",
                "check that the collector is up, then its queues and the export time below. No request "
                "waits for an export.",
            ),
            Query(dropped, ""),
            unit="short",
            decimals=0,
            thresholds=RED_FROM_ONE,
            links=[SERVICE_PAGE],
        ),
        number(
            PanelText(
                "Refused or lost by the collector",
                "Data that the collector refused, or gave up delivering.",
                "refused: its memory limit; failed: the backend rejects the data, and the collector's log "
                "has the reason.",
            ),
            Query(refused, ""),
            unit="short",
            decimals=0,
            thresholds=RED_FROM_ONE,
            links=[SERVICE_PAGE],
        ),
        number(
            PanelText(
                "Records lost",
                "Records of model calls that MLflow will never get.",
                "the spool was full or its records too old (SPOOL_MAX_BYTES, SPOOL_MAX_AGE_S), or its disk "
                "is full.",
            ),
            Query(zeroed(f"sum({increase(value(names.RECORDER_LOST))})"), ""),
            unit="short",
            decimals=0,
            thresholds=RED_FROM_ONE,
            links=[SERVICE_PAGE],
        ),
        number(
            PanelText(
                "Event loop lag (p99)",
                "How late the event loop runs a timer. Everything in the process waits as long.",
                "something blocks the event loop: a profile of the process (py-spy) shows what.",
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
            PanelText(
                "Dropped, by signal",
                "Data dropped by the service per second: at the queue, or at the export.",
                "at the queue: the process produces more than it can export; at the export: the collector "
                "does not answer.",
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
            PanelText(
                "Queues of the processes",
                "Fill level of the fullest queue of spans and of log records.",
                "a full queue drops new data: raise OTEL_BSP_MAX_QUEUE_SIZE or OTEL_BLRP_MAX_QUEUE_SIZE, "
                "or check the collector.",
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
            PanelText(
                "Export time: p95",
                "Duration of the service's exports to the collector.",
                "seconds mean that the collector is busy or far away; requests do not wait, but the queues "
                "above fill.",
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
            PanelText(
                "What can be scraped",
                "Whether Prometheus can scrape the collector, itself, Tempo, Loki and Grafana.",
                "run `docker compose ps` and read the log of the service that is down. Without the "
                "collector no other panel has new data.",
            ),
            Query("min by (job) (up)", "{{job}}"),
            [(0, "down", "red"), (1, "up", "green")],
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "Into the collector",
                "Spans, log records and metric points that the collector accepted, per second.",
                "0 while the service is busy: the service cannot reach the collector "
                "(OTEL_EXPORTER_OTLP_ENDPOINT).",
            ),
            _items("receiver_accepted"),
            unit="ops",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "Out of the collector",
                "Data that the collector delivered, per second. Tail sampling makes spans fewer than they "
                "came in.",
                "log records or points below what comes in: a queue fills, see the panel beside.",
            ),
            _items("exporter_sent"),
            unit="ops",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "Lost in the collector",
                "Data that the collector refused, could not queue, or could not deliver, per second.",
                "refused: its memory limit; enqueue failed: a full queue; send failed: the backend rejects "
                "the data, see its log.",
            ),
            [*_lost("receiver_refused"), *_lost("exporter_send_failed"), *_lost("exporter_enqueue_failed")],
            unit="ops",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            PanelText(
                "Queues of the collector",
                "Fill level of the queue of each backend. The queues are on disk and survive a restart.",
                "above half: the backend is down or too slow; a full queue loses the newest data.",
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
            PanelText(
                "Tail sampling",
                "Traces per second that were kept, not kept, and dropped before the decision (“forgotten”).",
                "“forgotten”: more traces at once than num_traces. Traces that are not kept have no error "
                "and no retry, and were fast.",
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
            PanelText(
                "Memory of the collector",
                "Resident memory. The collector refuses data from 384 MiB, and its container is killed at "
                "768 MiB.",
                "near the limit: fewer traces at once (num_traces), or a larger limit for collector and "
                "container.",
            ),
            [Query(zeroed(f"max({collector('otelcol_process_memory_rss_bytes')})"), "resident")],
            unit="bytes",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
    ]
    recording = [
        graph(
            PanelText(
                "Records that wait for MLflow",
                "Records of model calls that MLflow does not have yet; records per second that had to "
                "wait, were delivered late, or were lost.",
                "check that mlflow is up (“Whose fault is it?”). Records wait on disk and are delivered "
                "when it is back.",
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
            PanelText(
                "Event loop lag",
                "How late the event loop runs a timer: median and p99.",
                "compare with the latency of calls at the same time: they wait as long.",
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
            PanelText(
                "What the recorder and the stop said",
                "Log records of the recorder (records that had to wait or were delivered late) and of "
                "shutdowns.",
                "`llmops.recorder.spooled` has MLflow's reason.",
            ),
            '{service_name=~"$service"} | event_name=~"llmops\\\\.(recorder|shutdown)\\\\..*"',
            links=[SERVICE_PAGE],
        ),
    ]
    return page(
        "llmops-telemetry",
        "Telemetry: is it sound?",
        "Drops, queues, and the state of the stack itself.",
        [
            ("Totals", sums),
            ("In the service", process),
            ("In the collector", collecting),
            ("Records and event loop", recording),
        ],
    )
