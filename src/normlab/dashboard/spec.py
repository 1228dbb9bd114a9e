"""Workspaces and the report as objects of `wandb_workspaces`, which this file alone imports; nothing asks a server.

A workspace shows the runs of a section's arguments as they come, grouped by norm: it is filtered by tags. The report
shows the very runs that a verdict was computed from, arm by arm: their names stand in the table of the results.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("WANDB_SILENT", "true")  # before wandb is imported: what is said is said in one line, by us
import wandb_workspaces.reports.v2.interface as reports
import wandb_workspaces.workspaces as workspaces
from wandb_workspaces import expr

from normlab.claims.base import Claim
from normlab.config import config_to_dict
from normlab.dashboard.panels import Group, Lines, Panel, panels_of, panels_of_any_run
from normlab.report.judged import Argument, Measured
from normlab.report.page import verdict_table
from normlab.report.sections import overview
from normlab.report.sentences import label

__all__ = ["Dashboard", "build", "default_entity", "save", "spec_of"]

MOST_LINES = 50
"""W&B shows 10 in a panel unless told."""
BAND: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
"""Of the runs of a group: seeds."""
SETTING_FIELDS = ("data.corpus", "model.name", "model.placement", "model.activation", "model.width")
"""Which runs of one norm are not in one group, where the settings of a section differ in them."""
NOTE = (
    "The verdicts come from the tables in `results/` of the repository, not from the runs shown here; "
    "`make report` computes them anew, without an account. Curves: mean and range over the seeds of each arm."
)


@dataclass(frozen=True)
class Dashboard:
    """What is to be saved.

    Args:
        views: a workspace for each section by its letter in lower case, and "all" for runs without an argument.
        report: on all arguments.
    """

    views: dict[str, workspaces.Workspace]
    report: reports.Report


def build(arguments: Sequence[Argument], entity: str, project: str) -> Dashboard:
    """The same from the same arguments, but for nothing.

    Args:
        arguments: as judged from the results.
        entity: in W&B; empty if there is no account.
        project: in W&B.
    """
    sections: dict[str, list[Argument]] = {}
    for argument in arguments:
        sections.setdefault(argument.claim.section, []).append(argument)
    claims = [argument.claim for argument in arguments]
    views = {"all": _view("normlab: all runs", panels_of_any_run(claims), entity, project)}
    for letter, of_section in sections.items():
        claims = [argument.claim for argument in of_section]
        groups = panels_of(claims)
        if groups:
            view = _view(f"normlab: section {letter.upper()}", groups, entity, project)
            view.runset_settings = _runs_of(claims)
            views[letter] = view
    dashboard = Dashboard(views, _report(arguments, sections, entity, project))
    _name_all(dashboard)
    return dashboard


def spec_of(item: workspaces.Workspace | reports.Report) -> dict[str, Any]:
    """What is sent to W&B, as plain values."""
    return item._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def default_entity() -> str:
    """The account's, asked of the server."""
    return str(reports.Report(project="", title="").entity)


def save(item: workspaces.Workspace | reports.Report, ids: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Save in W&B, in place of what has these ids if there are any; returns its address and its ids.

    What was deleted there meanwhile is saved anew.
    """
    _take_ids(item, ids)
    try:
        item.save()
    except Exception:  # of a library over a network: any
        if not ids:
            raise
        _take_ids(item, {})
        item.save()
    if isinstance(item, reports.Report):
        return item.url, {"id": item.id}
    return item.url, {"id": item._internal_id, "name": item._internal_name}


def _take_ids(item: workspaces.Workspace | reports.Report, ids: Mapping[str, str]) -> None:
    if isinstance(item, reports.Report):
        item.id = ids.get("id", "")
    else:
        item._internal_id, item._internal_name = ids.get("id", ""), ids.get("name", "")


def _view(name: str, groups: Iterable[Group], entity: str, project: str) -> workspaces.Workspace:
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(name=group.title, panels=[_panel(panel) for panel in group.panels], is_open=True)
            for group in groups
        ],
        settings=workspaces.WorkspaceSettings(x_axis="step", max_runs=MOST_LINES),
        runset_settings=workspaces.RunsetSettings(groupby=[expr.Config("model.norm")]),
    )


def _runs_of(claims: Sequence[Claim]) -> workspaces.RunsetSettings:
    """The verdict runs of these arguments; tuning runs have other seeds."""
    measured = [claim for claim in claims if claim.settings]
    seeds = sorted({seed for claim in measured for seed in claim.verdict_seeds})
    ids = [claim.id for claim in measured]
    return workspaces.RunsetSettings(
        filters=[expr.Tags().isin(ids), expr.Config("seed").isin(seeds)],
        groupby=[*(expr.Config(field) for field in _fields_apart(measured)), expr.Config("model.norm")],
    )


def _fields_apart(claims: Iterable[Claim]) -> list[str]:
    values: dict[str, set[Any]] = {}
    for claim in claims:
        for setting in claim.settings.values():
            for base in setting.base.values():
                config = config_to_dict(base)
                for field in SETTING_FIELDS:
                    group, _, name = field.partition(".")
                    values.setdefault(field, set()).add(config[group].get(name))
    return [field for field, found in values.items() if len(found) > 1]


def _panel(panel: Panel) -> Any:
    if not isinstance(panel, Lines):
        return reports.BarPlot(title=panel.metric, metrics=[panel.metric], max_runs_to_show=MOST_LINES, **BAND)
    names: dict[str, Any] = {"metric_regex": panel.metric} if panel.is_pattern else {"y": [panel.metric]}
    title = f"{panel.metric} over {panel.x}"
    log = True if panel.log else None
    return reports.LinePlot(title=title, x=panel.x, log_y=log, max_runs_to_show=MOST_LINES, **names, **BAND)


def _report(
    arguments: Sequence[Argument], sections: dict[str, list[Argument]], entity: str, project: str
) -> reports.Report:
    blocks: list[Any] = [
        reports.MarkdownBlock(text=NOTE),
        reports.TableOfContents(),
        reports.H1(text="Verdicts"),
        reports.MarkdownBlock(text=verdict_table(overview(arguments))),
    ]
    for letter, of_section in sections.items():
        blocks.append(reports.H1(text=f"Section {letter.upper()}"))
        for argument in of_section:
            claim = argument.claim
            blocks.append(reports.H2(text=label(claim)))
            blocks.append(reports.P(text=claim.sentence))
            blocks.append(reports.P(text=f"Source: {claim.source}"))
            for part in argument.measured:
                blocks += _grids(part)
            if claim.settings and not argument.measured:
                blocks.append(reports.P(text="Not yet run."))
    return reports.Report(
        project=project,
        entity=entity,
        title="normlab: arguments and verdicts",
        blocks=blocks,
        width="fluid",
    )


def _grids(part: Measured) -> list[Any]:
    """For each setting the curves of its arms, and what was measured of them."""
    blocks: list[Any] = []
    panels = [panel for group in panels_of([part.claim]) for panel in group.panels]
    for name, setting in part.claim.settings.items():
        runs = {arm: _names(part, name, arm) for arm in setting.arms}
        runsets = [
            reports.Runset(name=arm, filters=[expr.Metric("Name").isin(of_arm)], groupby=["config.model.norm"])
            for arm, of_arm in runs.items()
            if of_arm
        ]
        if runsets:
            blocks.append(reports.H3(text=f"{name}, scale {part.scale}"))
            blocks.append(reports.PanelGrid(runsets=runsets, panels=[_panel(panel) for panel in panels]))
    return blocks


def _names(part: Measured, setting: str, arm: str) -> list[str]:
    """Of the verdict runs of an arm."""
    rows = (row for row in part.rows if (row.phase, row.setting, row.arm) == ("verdict", setting, arm))
    return list(dict.fromkeys(row.run_id for row in rows))


def _name_all(dashboard: Dashboard) -> None:
    """Ids by place, where the library draws them at random: the same dashboard is the same file."""
    for key, view in dashboard.views.items():
        for section in view.sections:
            _name(section.panels, key, section.name)
    for number, block in enumerate(dashboard.report.blocks):
        if isinstance(block, reports.PanelGrid):
            _name(block.runsets, "report", number, "runs")
            _name(block.panels, "report", number, "panels")


def _name(items: Iterable[Any], *place: object) -> None:
    for number, item in enumerate(items):
        item._id = hashlib.sha256(repr((*place, number)).encode()).hexdigest()[:12]
