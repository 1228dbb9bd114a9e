"""`python -m normlab report`: write the report, or say where it disagrees with the results."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from normlab.claims.base import Claim
from normlab.config import InputError
from normlab.records.disk import write_atomically
from normlab.report.judged import judge_all
from normlab.report.page import html, markdown, readme_table, tally
from normlab.report.sections import Picture, Section, overview, section

__all__ = ["report"]

BEGIN, END = "<!-- verdicts: begin -->", "<!-- verdicts: end -->"
FIGURES = "figures"
_SVG = re.compile(r"<svg .*?</svg>", re.DOTALL)


def report(claims: Sequence[Claim], results: Path, output: Path, readme: Path | None, *, check: bool) -> int:
    """Write `report.html`, `report.md` and `figures/` in `output`, and the block of verdicts in `readme`.

    Args:
        results: folder of the tables.
        check: write nothing; compare. Figures are then not drawn, so that their looks may differ between versions of
            matplotlib.

    Returns:
        The exit code: 1 if `check` finds a difference.

    Raises:
        InputError: a table is damaged, the README has no such block, or matplotlib is missing.
    """
    arguments = judge_all(claims, results)
    rows, sections = overview(arguments), [section(argument) for argument in arguments]
    pictures = list(_pictures(sections))
    svg = {picture.name: "<svg ></svg>" for picture in pictures} if check else _drawn(pictures)
    texts = {output / "report.html": html(rows, sections, svg), output / "report.md": markdown(rows, sections)}
    if readme is not None:
        page = Path(os.path.relpath(output / "report.md", readme.parent)).as_posix()
        texts[readme] = _filled(readme, readme_table(rows, page))
    if check:
        code = _check(texts, output, pictures)
        if not code:
            print(f"{', '.join(map(str, texts))} say what the tables do: {tally(rows)}")
        return code
    _write_figures(output / FIGURES, svg)
    for path, text in texts.items():
        write_atomically(path, text)
    print(f"wrote {', '.join(map(str, texts))}: {tally(rows)}")
    return 0


def _pictures(sections: Sequence[Section]) -> Iterator[Picture]:
    for each in sections:
        for part in each.parts:
            yield from part.pictures


def _drawn(pictures: Sequence[Picture]) -> dict[str, str]:
    try:
        from normlab.report import figures
    except ModuleNotFoundError as error:
        raise InputError(f"the report's figures need {error.name}: pip install {error.name}") from None
    return {picture.name: figures.draw(picture) for picture in pictures}


def _write_figures(folder: Path, svg: dict[str, str]) -> None:
    from normlab.report import figures

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        if old.stem not in svg:
            old.unlink()
    for name, text in svg.items():
        write_atomically(folder / f"{name}.svg", figures.alone(text))


def _filled(readme: Path, content: str) -> str:
    """The README with `content` in its block."""
    try:
        page = readme.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no {readme}; run this in the repository, or give --readme=none") from None
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise InputError(f"{readme} has no place for the verdicts: {BEGIN} and {END}")
    return f"{page.split(BEGIN)[0]}{BEGIN}\n{content}\n{END}{page.split(END)[1]}"


def _check(texts: dict[Path, str], output: Path, pictures: Sequence[Picture]) -> int:
    for path, wanted in texts.items():
        try:
            found = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            print(f"{path} is missing: make report")
            return 1
        difference = _first_difference(_SVG.sub("", found), _SVG.sub("", wanted))
        if difference:
            print(f"{path} disagrees with the results: {difference}: make report")
            return 1
    names, folder = {picture.name for picture in pictures}, output / FIGURES
    strange = names ^ {path.stem for path in folder.glob("*.svg")}
    if strange:
        print(f"{folder} has not the figures of the results: {', '.join(sorted(strange))}: make report")
        return 1
    return 0


def _first_difference(found: str, wanted: str) -> str:
    """The first line that differs, shortened to where it does; empty if none does."""
    if found == wanted:
        return ""
    there, here = found.split("\n"), wanted.split("\n")
    pairs = [*zip(there, here, strict=False)]
    number = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    a, b = (lines[number] if number < len(lines) else "" for lines in (there, here))
    same = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, same - 20)
    return f"line {number + 1} says {a[start : start + 60]!r}, they say {b[start : start + 60]!r}"
