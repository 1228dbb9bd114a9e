"""The report as one HTML page, as Markdown, and as the table of the README."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from normlab.report.sections import OVERVIEW, Section, VerdictRow

__all__ = ["html", "markdown", "readme_table", "tally", "verdict_table"]

VERDICTS = ("supported", "refuted", "mixed", "inconclusive", "not yet run")
_ARXIV = re.compile(r"arXiv:? ?(\d{4}\.\d{4,5})")
_MARKDOWN = re.compile(r"([\\`*_\[\]|~#$])")


def html(rows: Sequence[VerdictRow], sections: Sequence[Section], svg: Mapping[str, str]) -> str:
    """One page that needs nothing else.

    Args:
        svg: by the name of the picture, put in as it is; all else is escaped.
    """
    environment = _environment(autoescape=True)
    environment.filters |= {"linked": _linked, "verdict_class": lambda text: f"v-{text.replace(' ', '-')}"}
    template = environment.get_template("report.html")
    pictures = {name: Markup(text) for name, text in svg.items()}
    return template.render(**_shown(rows, sections), svg=pictures) + "\n"


def markdown(rows: Sequence[VerdictRow], sections: Sequence[Section]) -> str:
    """The same for who browses the repository; pictures are files in figures/."""
    environment = _environment(autoescape=False)
    environment.filters |= {"md": _escaped, "linked": _linked_markdown, "cells": _cells}
    return environment.get_template("report.md").render(**_shown(rows, sections), table=_overview("", rows)) + "\n"


def readme_table(rows: Sequence[VerdictRow], page: str) -> str:
    """The table of verdicts in Markdown, and how many there are of each.

    Args:
        page: where the Markdown report is, from the README.
    """
    return f"{_overview(page, rows)}\n\n{tally(rows)}"


def verdict_table(rows: Sequence[VerdictRow]) -> str:
    """The same for a page that stands by itself: without links."""
    return f"{_overview(None, rows)}\n\n{tally(rows)}"


def tally(rows: Sequence[VerdictRow]) -> str:
    """Such as "2 supported, 1 refuted, 0 mixed, 1 inconclusive, 3 not yet run"."""
    verdicts = [row.verdict for row in rows]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS)


def _environment(*, autoescape: bool) -> Environment:
    return Environment(
        loader=PackageLoader("normlab.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(rows: Sequence[VerdictRow], sections: Sequence[Section]) -> dict[str, object]:
    return {"columns": OVERVIEW, "rows": rows, "sections": sections, "verdicts": VERDICTS, "tally": tally(rows)}


def _overview(page: str | None, rows: Sequence[VerdictRow]) -> str:
    lines = [OVERVIEW, ("---",) * len(OVERVIEW)]
    text = [" | ".join(line) for line in lines]
    for row in rows:
        verdict = f"**{row.verdict}**" + (f" ({row.suffix})" if row.suffix else "")
        name = row.label if page is None else f"[{row.label}]({page}#{row.anchor})"
        cells = (
            f"{name} {_escaped(row.sentence)}",
            verdict,
            "<br>".join(map(_escaped, row.effects)),
            "<br>".join(map(_escaped, row.margins)),
            row.scale,
            row.seeds,
            _escaped(row.why),
        )
        text.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in text)


def _linked(text: str) -> Markup:
    """Escaped, with links to the papers it names."""
    return Markup(_ARXIV.sub(r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', escape(text)))


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return _MARKDOWN.sub(r"\\\1", escape(re.sub(r"[ \t\r\n]+", " ", text), quote=False))


def _linked_markdown(text: str) -> str:
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", _escaped(text))


def _cells(values: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(_escaped(value) or ' ' for value in values)} |"
