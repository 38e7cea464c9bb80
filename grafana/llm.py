"""What does it cost, and what do the models do? Calls, tokens, money, speed, and what the cache saves."""

from typing import Final

from grafana_foundation_sdk.models import dashboard

from grafana.panels import (
    QUARTER,
    THIRD,
    Query,
    Words,
    graph,
    increase,
    number,
    page,
    rate,
    traces,
    zeroed,
)
from grafana.series import SERVICE, bucket, by, label, value
from grafana.standard import MODEL
from service.telemetry import names

SERVICE_PAGE: Final = ("Are users hurting?", "/d/llmops-service?${__url_time_range}&${service:queryparam}")
DEPENDENCIES: Final = (
    "Whose fault is it?",
    "/d/llmops-dependencies?${__url_time_range}&${service:queryparam}",
)
_HIT_OR_MISS: Final = '=~"hit|miss"'
_INPUT: Final = f"llmops:gen_ai_input_tokens:rate5m{{{SERVICE}}}"
_OUTPUT: Final = f"llmops:gen_ai_output_tokens:rate5m{{{SERVICE}}}"
_DURATION: Final = f"llmops:gen_ai_duration_seconds_bucket:rate5m{{{SERVICE}}}"


def llm() -> dashboard.Dashboard:
    """What it costs: calls, tokens and money by model, speed by model, what the cache saves."""
    sums = [
        number(
            Words(
                "Calls",
                "Model calls that ended, answers from the cache and failed ones included.",
                "it is never red; a drop to 0 at a busy hour is an outage in front of the service.",
            ),
            Query(zeroed(f"sum({increase(value(names.LLM_CALLS))})"), ""),
            unit="short",
            decimals=0,
            links=[SERVICE_PAGE],
        ),
        number(
            Words(
                "Cost",
                "What the calls cost, as LiteLLM reports it. A model without a price counts as nothing.",
                "find the model in “Cost by model”, then its callers in MLflow.",
            ),
            Query(zeroed(f"sum({increase(value(names.LLM_COST))})"), ""),
            unit="currencyUSD",
            decimals=4,
            links=[SERVICE_PAGE],
        ),
        number(
            Words(
                "Hits of the cache",
                "The share of look-ups that were answered from the cache; those that callers declined are"
                " left out.",
                "0 with traffic: Qdrant is down (see “Whose fault is it?”), or the requests never repeat.",
            ),
            Query(
                f"sum({increase(value(names.CACHE_LOOKUPS, result='hit'))})"
                f" / (sum({increase(value(names.CACHE_LOOKUPS, result=_HIT_OR_MISS))}) > 0) or on ()"
                f" vector(0)",
                "",
            ),
            unit="percentunit",
            decimals=1,
            links=[DEPENDENCIES],
        ),
        number(
            Words(
                "Saved",
                "What the answers from the cache had cost when a model made them.",
                "compare with the cost beside it: a cache that saves nothing costs a look-up for each call.",
            ),
            Query(zeroed(f"sum({increase(value(names.CACHE_SAVED_COST))})"), ""),
            unit="currencyUSD",
            decimals=4,
            links=[DEPENDENCIES],
        ),
        number(
            Words(
                "Tokens saved",
                "Tokens that the cache answered for, and nobody paid for again.",
                "as for the hits: few hits, few tokens.",
            ),
            Query(zeroed(f"sum({increase(value(names.CACHE_SAVED_TOKENS))})"), ""),
            unit="short",
            decimals=0,
            links=[DEPENDENCIES],
        ),
    ]
    calls = [
        graph(
            Words(
                "Calls by how they ended",
                "Model calls per second: answered, from the cache, failed, or left by the caller.",
                "“error”: “Whose fault is it?”; “cancelled” rises: callers lose patience, see the time to"
                " first piece.",
            ),
            [
                Query(
                    zeroed(f"sum by ({by(names.LLM_CALLS, 'outcome')}) ({rate(value(names.LLM_CALLS))})"),
                    "{{outcome}}",
                )
            ],
            unit="ops",
            stacked=True,
            width=THIRD,
            links=[DEPENDENCIES],
        ),
        graph(
            Words(
                "Calls by model",
                "Model calls per second by model; names that LiteLLM does not list count as `other`.",
                "a model that nobody should use: its callers are in MLflow.",
            ),
            [
                Query(
                    zeroed(f"sum by ({by(names.LLM_CALLS, 'model')}) ({rate(value(names.LLM_CALLS))})"),
                    "{{model}}",
                )
            ],
            unit="ops",
            stacked=True,
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Errors by model",
                "Failed model calls per second by model and error.",
                "one model only: its provider; all of them: LiteLLM or the network.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(names.LLM_CALLS, 'model', 'error.type')})"
                        f" ({rate(value(names.LLM_CALLS, outcome='error'))})"
                    ),
                    "{{model}} {{error_type}}",
                )
            ],
            unit="ops",
            width=THIRD,
            links=[DEPENDENCIES],
        ),
    ]
    money = [
        graph(
            Words(
                "Tokens by model: input",
                "Tokens that went to the models, per second.",
                "a jump without more calls: somebody sends longer prompts.",
            ),
            [Query(zeroed(f"sum by ({label(MODEL)}) ({_INPUT})"), "{{gen_ai_request_model}}")],
            unit="short",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Tokens by model: output",
                "Tokens that the models answered with, per second.",
                "a jump without more calls: longer answers, and a higher bill; see `max_tokens`.",
            ),
            [Query(zeroed(f"sum by ({label(MODEL)}) ({_OUTPUT})"), "{{gen_ai_request_model}}")],
            unit="short",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Cost by model",
                "Dollars per hour, by model.",
                "compare with the tokens: more tokens, or a dearer model?",
            ),
            [
                Query(
                    zeroed(f"sum by ({by(names.LLM_COST, 'model')}) ({rate(value(names.LLM_COST))}) * 3600"),
                    "{{model}}",
                )
            ],
            unit="currencyUSD",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
    ]
    speed = [
        graph(
            Words(
                "Attempts by model: p95",
                "How long attempts take at each model, to the last byte.",
                "one model only: its provider is slow; all: LiteLLM, or the network to it.",
            ),
            [
                Query(
                    zeroed(f"histogram_quantile(0.95, sum by ({label(MODEL)}, le) ({_DURATION})) >= 0"),
                    "{{gen_ai_request_model}}",
                )
            ],
            unit="s",
            width=THIRD,
            links=[DEPENDENCIES],
        ),
        graph(
            Words(
                "Time to first piece by model: p95",
                "Streamed calls: from the request to the first piece, by model.",
                "callers of chats feel this more than anything else; a smaller model answers sooner.",
            ),
            [
                Query(
                    zeroed(
                        f"histogram_quantile(0.95, sum by ({by(names.LLM_FIRST_CHUNK, 'model')}, le)"
                        f" ({rate(bucket(names.LLM_FIRST_CHUNK))})) >= 0"
                    ),
                    "{{model}}",
                    exemplars=True,
                )
            ],
            unit="s",
            width=THIRD,
            links=[SERVICE_PAGE],
        ),
        graph(
            Words(
                "Likeness of semantic hits",
                "The middle of how like the nearest entry was to what was asked; only with the semantic"
                " cache on.",
                "near the threshold: answers may not fit; raise it, or switch the semantic look-up off.",
            ),
            [
                Query(
                    zeroed(
                        f"histogram_quantile(0.5, sum by (le) ({rate(bucket(names.CACHE_SIMILARITY))})) >= 0",
                    ),
                    "median",
                )
            ],
            unit="percentunit",
            width=THIRD,
            links=[DEPENDENCIES],
        ),
        graph(
            Words(
                "Saved by the cache",
                "Tokens per second that the cache answered for, by kind of look-up.",
                "it fell, and the calls did not: the cache was cleared, is down, or the requests changed.",
            ),
            [
                Query(
                    zeroed(
                        f"sum by ({by(names.CACHE_SAVED_TOKENS, 'kind')})"
                        f" ({rate(value(names.CACHE_SAVED_TOKENS))})"
                    ),
                    "{{kind}}",
                )
            ],
            unit="short",
            width=QUARTER * 2,
            links=[DEPENDENCIES],
        ),
    ]
    evidence = [
        traces(
            Words(
                "Model calls",
                "The newest traces with a call of a model; a click on an id opens it.",
                "its page in MLflow (link in the trace's logs) has tokens, cost and user.",
            ),
            '{resource.service.name=~"$service" && span.gen_ai.operation.name != nil && kind=client}',
            links=[SERVICE_PAGE],
        )
    ]
    return page(
        "llmops-llm",
        "LLM: what does it cost?",
        "Calls, tokens and money by model; speed; what the cache saves.",
        [
            ("Sums", sums),
            ("Calls", calls),
            ("Tokens and money", money),
            ("Speed and cache", speed),
            ("Evidence", evidence),
        ],
    )
