"""Tables of results that somebody else filled, and names that are no names, are shown and not obeyed."""

from __future__ import annotations

import csv
import dataclasses
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from made_up import DRAWN, _effect, _probes, invented, make_rows, write_results
from markdown_it import MarkdownIt
from test_report import Page

from normlab.__main__ import main
from normlab.claims.families import norm_arm
from normlab.claims.figure_tables import ProbeRow, probes_path, read_table, write_table
from normlab.claims.rows import read_rows, write_rows
from normlab.report.command import BEGIN, END, report

HTML = "<img src=x onerror=alert(1)>&lt;]]>-->"
MARKDOWN = "](javascript:alert(1)) | `a` ![x](http://x/y.png)"
MATHS = r"$\nothing{$ $x_1^2$"
HOSTILE = f"{HTML} {MARKDOWN} {MATHS} \x1b[31m"
NAMED = invented("x5_named", HOSTILE, {MATHS: norm_arm("ln"), HTML: norm_arm("rms"), MARKDOWN: norm_arm("bn")})


def spoil(table: Path, **columns: str) -> None:
    """Put these values into all rows."""
    with table.open(newline="") as file:
        rows = [{**row, **columns} for row in csv.DictReader(file)]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def is_harmless(folder: Path) -> None:
    """In none of the pages does a tag, a link or a picture come from the tables."""
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    pages = [(folder / "report.html").read_text()]
    pages += [markdown.render((folder / name).read_text()) for name in ("report.md", "README.md")]
    for text in pages:
        page = Page(text)
        for tag, attributes in page.tags:
            assert "onerror" not in attributes
            assert (tag, attributes.get("src")) != ("img", "x")
            for name in ("href", "src"):
                assert not (attributes.get(name) or "").startswith(("javascript:", "http://x/"))
    figures = list((folder / "figures").glob("*.svg"))
    assert figures
    for figure in figures:
        tree = ElementTree.fromstring(figure.read_text())
        assert not [part for part in tree.iter() if part.tag.endswith(("script", "image", "foreignObject", "}a"))]
        assert not [part for part in tree.iter() if any(name.startswith("on") for name in part.attrib)]


def test_names_and_cells(tmp_path: Path) -> None:
    claims = (NAMED, DRAWN)
    for claim, best in ((NAMED, MATHS), (DRAWN, "ln")):
        write_rows(tmp_path / "small" / f"{claim.id}.csv", make_rows(claim, "small", _effect({best: -0.05})))
        spoil(tmp_path / "small" / f"{claim.id}.csv", machine=HOSTILE, commit=HOSTILE)
    probes = probes_path(tmp_path / "small" / f"{DRAWN.id}.csv")
    write_table(probes, _probes(DRAWN)[:200])
    spoil(probes, by=HOSTILE)
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert report(claims, tmp_path, tmp_path, readme, check=False) == 0
    is_harmless(tmp_path)
    shown = Page((tmp_path / "report.html").read_text()).text
    assert HTML in shown
    assert MARKDOWN in shown
    assert MATHS in shown
    assert report(claims, tmp_path, tmp_path, readme, check=True) == 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path)
    table = tmp_path / "small" / "d4_ln_solves_it.csv"
    run_id = f"{HTML}{MARKDOWN}"
    spoil(table, machine=HOSTILE, commit=HOSTILE, run_id=run_id)
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert main(["report", "--results", str(tmp_path), "--readme", str(readme)]) == 0
    is_harmless(tmp_path)
    assert run_id in Page((tmp_path / "report.html").read_text()).text
    assert "\x1b" not in capsys.readouterr().out


def test_a_spreadsheet_computes_nothing(tmp_path: Path) -> None:
    rows = make_rows(DRAWN, "small", _effect({}))[:1]
    path = tmp_path / "table.csv"
    for hostile in ("=HYPERLINK(1)", "+1", "-1+1", "@SUM(1)", "\t=1"):
        write_rows(path, [dataclasses.replace(rows[0], machine=hostile, value=-1.5)])
        (row,) = read_rows(path)
        assert row.value == -1.5
        assert row.machine == f"'{hostile}"
        write_rows(path, [row])
        assert read_rows(path) == [row], "once is enough"
        probe = ProbeRow("s", "a", "p", "", hostile, "x", -1.0, "q", -2.0, 0.0, 1)
        write_table(path, [probe])
        (read,) = read_table(path, ProbeRow)
        assert read.by == row.machine
        assert read.mean == -2.0
    write_rows(path, [dataclasses.replace(rows[0], machine="a\rb")])
    assert read_rows(path)[0].machine == r"a\rb"
