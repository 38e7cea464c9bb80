"""The kinds of panels. Each has a unit, a description with what to do when red, and 0 instead of no data.

Datasources are named by the uids in `provisioning/datasources/`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import (
    logs,
    loki,
    prometheus,
    stat,
    statetimeline,
    table,
    tempo,
    timeseries,
)
from grafana_foundation_sdk.cog import builder, variants
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.tempo import SearchTableType

PROMETHEUS: Final = common.DataSourceRef(type_val="prometheus", uid="prometheus")
TEMPO: Final = common.DataSourceRef(type_val="tempo", uid="tempo")
LOKI: Final = common.DataSourceRef(type_val="loki", uid="loki")
POSTGRESQL: Final = common.DataSourceRef(type_val="grafana-postgresql-datasource", uid="postgresql")

HALF, THIRD, QUARTER, FULL = 12, 8, 6, 24
TALL, LOW = 8, 4

Links = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Query:
    """One PromQL query, and the legend of its series."""

    expr: str
    legend: str
    exemplars: bool = False


class _SqlTarget(builder.Builder[variants.Dataquery], variants.Dataquery):
    """A query of the PostgreSQL datasource, which the SDK has no type for."""

    def __init__(self, sql: str, *, over_time: bool) -> None:
        self._sql = sql
        self._format = "time_series" if over_time else "table"

    def build(self) -> variants.Dataquery:
        return self

    def to_json(self) -> dict[str, object]:
        """The query as Grafana stores it."""
        return {
            "datasource": POSTGRESQL,
            "editorMode": "code",
            "format": self._format,
            "rawQuery": True,
            "rawSql": self._sql,
            "refId": "A",
        }


@dataclass(frozen=True)
class Column:
    """How a column of a table is shown.

    Args:
        unit: The unit of its values.
        decimals: The number of decimals.
        thresholds: Colours of the background; without them it has none.
        width: In pixels; without it Grafana decides.
    """

    unit: str = "none"
    decimals: int | None = None
    thresholds: Sequence[tuple[float | None, str]] = ()
    width: int | None = None

    def properties(self) -> list[dashboard.DynamicConfigValue]:
        """The same as Grafana's overrides of a field."""
        found: dict[str, Any] = {"unit": self.unit}
        if self.decimals is not None:
            found["decimals"] = self.decimals
        if self.width is not None:
            found["custom.width"] = self.width
        if self.thresholds:
            found["thresholds"] = steps(*self.thresholds).build()
            found["custom.cellOptions"] = {"type": "color-background", "mode": "basic"}
        return [dashboard.DynamicConfigValue(id_val=name, value=value) for name, value in found.items()]


@dataclass(frozen=True)
class PanelText:
    """A panel's title, what it shows, and what to do when it is red."""

    title: str
    shows: str
    when_red: str

    @property
    def description(self) -> str:
        """The text behind the panel's (i)."""
        return f"{self.shows}\n\n**When it is red:** {self.when_red}"


def zeroed(expr: str) -> str:
    """Return a query that yields 0 instead of no series, so that panels of a new system are not empty."""
    return f"{expr} or on () vector(0)"


def rate(selector: str) -> str:
    """Return the rate per second, over the window that Grafana chooses."""
    return f"rate({selector}[$__rate_interval])"


def increase(selector: str) -> str:
    """Return the increase over the time range of the dashboard."""
    return f"increase({selector}[$__range])"


def steps(*values: tuple[float | None, str]) -> builders.ThresholdsConfig:
    """Return thresholds; each colour applies from its value upwards."""
    return (
        builders.ThresholdsConfig()
        .mode(dashboard.ThresholdsMode.ABSOLUTE)
        .steps([dashboard.Threshold(value=value, color=color) for value, color in values])
    )


RED_FROM_ONE: Final = ((None, "green"), (0.000001, "red"))
ALWAYS_BLUE: Final = ((None, "blue"),)


def _targets(queries: Sequence[Query], *, instant: bool) -> list[Any]:
    built = []
    for number, query in enumerate(queries):
        target = (
            prometheus.Dataquery()
            .datasource(PROMETHEUS)
            .ref_id(chr(ord("A") + number))
            .expr(query.expr)
            .legend_format(query.legend)
            .exemplar(query.exemplars)
        )
        built.append(target.instant() if instant else target.range())
    return built


def _links(links: Links) -> list[Any]:
    return [builders.DashboardLink(title).url(url).target_blank(target_blank=False) for title, url in links]


def _labelled(panel: Any, text: PanelText, links: Links, width: int, height: int) -> Any:  # noqa: ANN401 - each kind of panel has its own builder
    return (
        panel.title(text.title).description(text.description).span(width).height(height).links(_links(links))
    )


def number(
    text: PanelText,
    query: Query,
    *,
    unit: str,
    thresholds: Sequence[tuple[float | None, str]] = ALWAYS_BLUE,
    decimals: int | None = None,
    width: int = QUARTER,
    links: Links = (),
) -> stat.Panel:
    """Return a panel with one number over the time range of the dashboard."""
    panel = stat.Panel().datasource(PROMETHEUS).targets(_targets([query], instant=True))
    return _number(_labelled(panel, text, links, width, LOW), unit, thresholds, decimals)


def sql_number(
    text: PanelText,
    sql: str,
    *,
    unit: str,
    thresholds: Sequence[tuple[float | None, str]] = ALWAYS_BLUE,
    decimals: int | None = None,
    width: int = QUARTER,
    links: Links = (),
) -> stat.Panel:
    """Return a panel with the one number of a query in SQL."""
    panel = stat.Panel().datasource(POSTGRESQL).with_target(_SqlTarget(sql, over_time=False))
    return _number(_labelled(panel, text, links, width, LOW), unit, thresholds, decimals)


def _number(
    panel: stat.Panel,
    unit: str,
    thresholds: Sequence[tuple[float | None, str]],
    decimals: int | None,
) -> stat.Panel:
    panel = (
        panel.unit(unit)
        .no_value("0")
        .thresholds(steps(*thresholds))
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.NONE)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]).values(values=False))
    )
    return panel if decimals is None else panel.decimals(decimals)


def graph(
    text: PanelText,
    queries: Sequence[Query],
    *,
    unit: str,
    width: int = HALF,
    stacked: bool = False,
    thresholds: Sequence[tuple[float | None, str]] = (),
    links: Links = (),
) -> timeseries.Panel:
    """Return a panel with lines over time."""
    panel: timeseries.Panel = _labelled(timeseries.Panel(), text, links, width, TALL)
    panel = (
        panel.datasource(PROMETHEUS)
        .targets(_targets(queries, instant=False))
        .unit(unit)
        .no_value("0")
        .min(0)
        .fill_opacity(20 if stacked else 5)
        .show_points(common.VisibilityMode.NEVER)
        .legend(
            common_builders.VizLegendOptions()
            .show_legend(show_legend=True)
            .placement(common.LegendPlacement.BOTTOM)
            .display_mode(common.LegendDisplayMode.TABLE)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
    )
    if stacked:
        panel = panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    if thresholds:
        panel = panel.thresholds(steps(*thresholds)).thresholds_style(
            common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.LINE)
        )
    return panel


def sql_bars(
    text: PanelText, sql: str, *, unit: str, width: int = HALF, links: Links = ()
) -> timeseries.Panel:
    """Return a panel with stacked bars over time.

    The query has the columns ``time``, ``metric`` and ``value``, or ``time`` and one column for each series.
    """
    panel: timeseries.Panel = _labelled(timeseries.Panel(), text, links, width, TALL)
    return (
        panel.datasource(POSTGRESQL)
        .with_target(_SqlTarget(sql, over_time=True))
        .unit(unit)
        .no_value("0")
        .min(0)
        .draw_style(common.GraphDrawStyle.BARS)
        .bar_alignment(common.BarAlignment.AFTER)
        .fill_opacity(80)
        .stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
        .legend(
            common_builders.VizLegendOptions()
            .show_legend(show_legend=True)
            .placement(common.LegendPlacement.RIGHT)
            .display_mode(common.LegendDisplayMode.TABLE)
            .calcs(["sum"])
            .sort_by("Total")
            .sort_desc(sort_desc=True)
        )
        .tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
    )


def sql_table(
    text: PanelText, sql: str, columns: Mapping[str, Column], *, width: int = HALF, links: Links = ()
) -> table.Panel:
    """Return a panel with the rows of a query in SQL; a column's filter is in its head.

    Columns that are not named hold text: with a numeric unit, Grafana would show the name 4000 as 4 K.
    """
    panel: table.Panel = _labelled(table.Panel(), text, links, width, TALL)
    panel = (
        panel.datasource(POSTGRESQL)
        .with_target(_SqlTarget(sql, over_time=False))
        .unit("string")
        .no_value("0")
        .filterable(filterable=True)
    )
    for name, column in columns.items():
        panel = panel.override_by_name(name, column.properties())
    return panel


def timeline(
    text: PanelText,
    query: Query,
    states: Sequence[tuple[int, str, str]],
    *,
    width: int = HALF,
    links: Links = (),
) -> statetimeline.Panel:
    """Return a panel with states over time; each state is a value, its name and its colour."""
    panel: statetimeline.Panel = _labelled(statetimeline.Panel(), text, links, width, TALL)
    mapping = dashboard.ValueMap(
        options={
            str(value): dashboard.ValueMappingResult(text=text, color=color, index=index)
            for index, (value, text, color) in enumerate(states)
        }
    )
    return (
        panel.datasource(PROMETHEUS)
        .targets(_targets([query], instant=False))
        .unit("none")
        .no_value("0")
        .mappings([mapping])
        .merge_values(merge_values=True)
        .show_value(common.VisibilityMode.NEVER)
    )


def log_lines(text: PanelText, expr: str, *, width: int = FULL, links: Links = ()) -> logs.Panel:
    """Return a panel with log records from Loki, newest first."""
    panel: logs.Panel = _labelled(logs.Panel(), text, links, width, TALL)
    target = loki.Dataquery().datasource(LOKI).ref_id("A").expr(expr).max_lines(100)
    return (
        panel.datasource(LOKI)
        .with_target(target)
        .show_time(show_time=True)
        .enable_log_details(enable_log_details=True)
        .sort_order(common.LogsSortOrder.DESCENDING)
    )


def traces(text: PanelText, query: str, *, width: int = FULL, links: Links = ()) -> table.Panel:
    """Return a panel with traces from Tempo; a click on an id opens the trace."""
    panel: table.Panel = _labelled(table.Panel(), text, links, width, TALL)
    target = (
        tempo.Dataquery()
        .datasource(TEMPO)
        .ref_id("A")
        .query_type("traceql")
        .query(query)
        .limit(20)
        .table_type(SearchTableType.TRACES)
    )
    return panel.datasource(TEMPO).with_target(target)


Section = tuple[str, Sequence[Any]]


def page(
    uid: str,
    title: str,
    description: str,
    sections: Sequence[Section],
    *,
    since: str = "now-1h",
    refresh: str = "30s",
    timezone: str = "browser",
    by_service: bool = True,
) -> dashboard.Dashboard:
    """Return a dashboard of panels in sections, with links to the other dashboards.

    Args:
        uid: The last part of its URL.
        title: Its title.
        description: What it shows.
        sections: The panels.
        since: The beginning of the time range that it opens with.
        refresh: How often it asks again.
        timezone: ``utc`` where the panels show days in UTC.
        by_service: Whether it has the variable ``service``, for queries that select by it.
    """
    board = (
        builders.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["llmops"])
        .timezone(timezone)
        .time(since, "now")
        .refresh(refresh)
        .readonly()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .link(
            builders.DashboardLink("Other dashboards")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags(["llmops"])
            .include_vars(include_vars=True)
            .keep_time(keep_time=True)
        )
    )
    if by_service:
        board = board.with_variable(
            builders.QueryVariable("service")
            .label("Service")
            .datasource(PROMETHEUS)
            .query("label_values(llmops_requests_in_flight, service_name)")
            .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
            .multi(multi=True)
            .include_all(include_all=True)
            .all_value(".+")
            .current(dashboard.VariableOption(text="All", value="$__all", selected=True))
        )
    for name, panels in sections:
        board = board.with_row(builders.Row(name))
        for panel in panels:
            board = board.with_panel(panel)
    return board.build()


Board = Callable[[], dashboard.Dashboard]
