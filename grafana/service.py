"""Are users hurting? The dashboard that Grafana opens with."""

from typing import Final

from grafana_foundation_sdk.models import dashboard

from grafana.objectives import AVAILABILITY, CALLS, LATENCY, NOT_SERVED, SLOW_S, WINDOW, Objective
from grafana.panels import (
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
    traces,
    zeroed,
)
from grafana.parties import FAILURES
from grafana.series import FAILED, SERVICE, bucket, by, count, value
from grafana.standard import SERVER_DURATION
from service.telemetry import names

DEPENDENCIES: Final = (
    "Whose fault is it?",
    "/d/llmops-dependencies?${__url_time_range}&${service:queryparam}",
)
MODELS: Final = ("Model by model", "/d/llmops-llm?${__url_time_range}&${service:queryparam}")
_SERVED: Final = {"http_route": f'!="", http_route!~"{NOT_SERVED}"'}
_CALLS: Final = {"http_route": f'=~"{CALLS}"', "error_type": '=""'}
# Probes that are told "not ready" are no errors; without a route there is no label, which is no probe either.
_NOT_PROBES: Final = f'!~"{NOT_SERVED}"'
_FAILURES: Final = '=~"' + "|".join(FAILURES) + '"'


def _share(bad: str, everything: str) -> str:
    """1 minus the share of the bad; 1 where nothing was asked, as then nobody was hurt."""
    return f"1 - (sum({increase(bad)}) or vector(0)) / (sum({increase(everything)}) > 0 or vector(1))"


def _budget_left(objective: Objective) -> str:
    recorded = f"max({objective.ratio(WINDOW)}{{{SERVICE}}})"
    return f"1 - ({recorded} or vector(0)) / {objective.budget}"


def _burn(objective: Objective, window: str) -> str:
    return zeroed(f"max({objective.ratio(window)}{{{SERVICE}}}) / {objective.budget}")


def service() -> dashboard.Dashboard:
    """Are users hurting: the objectives, what is asked and answered, how fast."""
    served = count(SERVER_DURATION, **_SERVED)
    failed = count(SERVER_DURATION, **_SERVED, error_type=_FAILURES)
    answered = count(SERVER_DURATION, **_CALLS)
    in_time = bucket(SERVER_DURATION, **_CALLS, le=f'="{SLOW_S}"')
    call_buckets = bucket(SERVER_DURATION, http_route=f'=~"{CALLS}"')
    objectives = [
        number(
            Words(
                "Availability",
                f"The share of requests that did not fail through us or the upstream. Objective:"
                f" {AVAILABILITY.target:.1%} over"
                f" {WINDOW}.",
                "look at “Errors by name” below, then at “Whose fault is it?”.",
            ),
            Query(_share(failed, served), ""),
            unit="percentunit",
            decimals=2,
            thresholds=((None, "red"), (AVAILABILITY.target, "green")),
            links=[DEPENDENCIES],
        ),
        number(
            Words(
                "Availability budget left",
                f"What is left of the failures that {WINDOW} may have; 100 % is an untouched budget.",
                "the objective is missed when it reaches 0: stop risky changes, see which alert fired first.",
            ),
            Query(_budget_left(AVAILABILITY), ""),
            unit="percentunit",
            decimals=1,
            thresholds=((None, "red"), (0.1, "orange"), (0.5, "green")),
            links=[DEPENDENCIES],
        ),
        number(
            Words(
                f"Calls within {SLOW_S} s",
                f"The share of answered model calls that took at most {SLOW_S} s, streams to their last byte."
                f" Objective: {LATENCY.target:.0%} over {WINDOW}.",
                "look at “Latency of model calls”, open an exemplar, and see which attempt took the time.",
            ),
            Query(
                f"(sum({increase(in_time)}) or vector(0)) / (sum({increase(answered)}) > 0)"
                " or on () vector(1)",
                "",
            ),
            unit="percentunit",
            decimals=2,
            thresholds=((None, "red"), (LATENCY.target, "green")),
            links=[MODELS],
        ),
        number(
            Words(
                "Latency budget left",
                f"What is left of the slow calls that {WINDOW} may have.",
                "as for the availability budget: fewer risks until it has recovered.",
            ),
            Query(_budget_left(LATENCY), ""),
            unit="percentunit",
            decimals=1,
            thresholds=((None, "red"), (0.1, "orange"), (0.5, "green")),
            links=[MODELS],
        ),
    ]
    traffic = [
        graph(
            Words(
                "Requests by status",
                "Requests per second by the status that they were answered with, health routes aside.",
                "a new 5xx is ours or the upstream's; a new 4xx is a caller's release. “Errors by name”"
                " tells which.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(SERVER_DURATION, 'http.response.status_code')}) ({rate(served)})",
                    ),
                    "{{http_response_status_code}}",
                )
            ],
            unit="reqps",
            stacked=True,
            links=[DEPENDENCIES],
        ),
        graph(
            Words(
                "Errors by name",
                "Failed requests per second by the name that the caller got in the body.",
                "take the name to the table in service/errors.py: it says whose fault it is and what to do.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(SERVER_DURATION, 'error.type')})"
                        f" ({rate(count(SERVER_DURATION, error_type=FAILED, http_route=_NOT_PROBES))})"
                    ),
                    "{{error_type}}",
                )
            ],
            unit="reqps",
            links=[DEPENDENCIES],
        ),
        graph(
            Words(
                "Latency of model calls",
                "How long callers wait for the whole answer: half of them, 95 % and 99 % wait less. The"
                " dots are"
                " exemplars: each opens its trace.",
                f"above {SLOW_S} s the latency budget burns: open a dot at the top and see which span is"
                f" long.",
            ),
            [
                Query(
                    zeroed(f"histogram_quantile({quantile}, sum by (le) ({rate(call_buckets)})) >= 0"),
                    f"p{quantile * 100:g}",
                    exemplars=True,
                )
                for quantile in (0.5, 0.95, 0.99)
            ],
            unit="s",
            thresholds=((None, "transparent"), (SLOW_S, "red")),
            links=[MODELS],
        ),
        graph(
            Words(
                "Time to first piece",
                "Streamed calls: from the request to the first piece that the caller sees, retries and"
                " waits included.",
                "compare with “Model by model”: slow there as well is the provider, slow only here is"
                " waiting or retrying.",
            ),
            [
                Query(
                    zeroed(
                        f"histogram_quantile({quantile}, sum by (le)"
                        f" ({rate(bucket(names.LLM_FIRST_CHUNK))})) >= 0"
                    ),
                    f"p{quantile * 100:g}",
                    exemplars=True,
                )
                for quantile in (0.5, 0.95)
            ],
            unit="s",
            links=[MODELS],
        ),
    ]
    pressure = [
        graph(
            Words(
                "Burn rate",
                "How many times faster than allowed the budgets go, over an hour and over five minutes. 1"
                " uses up"
                " exactly the budget in 30 days; 14.4 for an hour pages.",
                "both lines of a kind are high: it is bad and still going on. Only the slow one: it is over.",
            ),
            [
                Query(_burn(objective, window), f"{objective.name} {window}")
                for objective in (AVAILABILITY, LATENCY)
                for window in ("1h", "5m")
            ],
            unit="none",
            width=THIRD,
            thresholds=((None, "transparent"), (14.4, "red")),
            links=[DEPENDENCIES],
        ),
        graph(
            Words(
                "In flight, and turned away",
                "Model and sign-in requests inside at the moment, and those that were turned away per"
                " second, by reason.",
                "“overloaded”: more processes, or a higher MAX_IN_FLIGHT; “rate_limited”: one caller, or"
                " RATE_LIMIT"
                " is too low; “draining” belongs to a rollout.",
            ),
            [
                Query(zeroed(f"sum({value(names.REQUESTS_IN_FLIGHT)})"), "in flight"),
                Query(
                    zeroed(
                        f"sum by ({by(names.REQUESTS_REJECTED, 'reason')})"
                        f" ({rate(value(names.REQUESTS_REJECTED))})"
                    ),
                    "{{reason}} /s",
                ),
            ],
            unit="short",
            width=THIRD,
            links=[DEPENDENCIES],
        ),
        graph(
            Words(
                "Sign-ins",
                "Sign-ins per second by how they ended.",
                "“wrong_credentials” or “rate_limited” rise: somebody tries passwords, or a client has an"
                " old one;"
                " the log below has the addresses.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(names.AUTH_ATTEMPTS, 'outcome')}) ({rate(value(names.AUTH_ATTEMPTS))})"
                    ),
                    "{{outcome}}",
                )
            ],
            unit="reqps",
            width=THIRD,
            links=[DEPENDENCIES],
        ),
        number(
            Words(
                "Bugs",
                "Requests that ended with InternalError: nobody's fault but ours.",
                "open the trace or the log record below; it has the stack trace, without what callers wrote.",
            ),
            Query(
                zeroed(f"sum({increase(count(SERVER_DURATION, error_type='InternalError'))})"),
                "",
            ),
            unit="short",
            decimals=0,
            thresholds=RED_FROM_ONE,
            links=[DEPENDENCIES],
        ),
    ]
    evidence = [
        traces(
            Words(
                "Failed and slow requests",
                f"Traces of requests that failed or took over {SLOW_S} s. The newest 30 s are not searched"
                f" yet.",
                "open one: the span with the error says what the upstream said; its logs and its MLflow"
                " page are links.",
            ),
            '{resource.service.name=~"$service" && kind=server && (span.http.response.status_code >= 500'
            f" || duration > {SLOW_S}s)}}",
            links=[DEPENDENCIES],
        ),
        log_lines(
            Words(
                "Warnings and errors",
                "The service's log records from warning up. Open one for its fields; its trace id is a link.",
                "read the event names from left to right: what failed first is at the bottom.",
            ),
            '{service_name=~"$service"} | severity_number >= 13',
            links=[DEPENDENCIES],
        ),
    ]
    return page(
        "llmops-service",
        "Service: are users hurting?",
        "Objectives, traffic, latency; and the traces and logs of what went wrong.",
        [
            ("Objectives", objectives),
            ("What callers see", traffic),
            ("Pressure", pressure),
            ("Evidence", evidence),
        ],
    )
