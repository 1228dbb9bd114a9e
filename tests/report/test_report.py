"""What the report says is what the tables say; it is safe to open, the same every time, and needs no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up import CLAIMS, DRAWN, FEW, INVENTED, LOST, NASTY, REFUTED, UNFINISHED, make_rows, write_results
from markdown_it import MarkdownIt

from normlab.__main__ import main
from normlab.claims import available_claims, load_claim
from normlab.claims.base import Claim, Scale
from normlab.claims.rows import read_rows, write_rows
from normlab.config import InputError, available_norms
from normlab.report.command import BEGIN, END, report
from normlab.report.figures import norm_colours
from normlab.stats.verdicts import ClaimVerdict, correct

ROOT = Path(__file__).parent.parent.parent

EXPECTED = [
    ("d2_shared_statistics_fail", "small", "supported"),
    ("d4_ln_solves_it", "small", "supported"),
    ("d4_ln_solves_it", "full", "refuted"),
    ("x1_refuted", "small", "refuted"),
    ("x2_mixed", "small", "mixed"),
    ("x3_inconclusive", "small", "inconclusive"),
    ("x4_lost", "small", "inconclusive"),
    ("x5_nasty", "exact", "supported (exact)"),
    ("x5_nasty", "small", "supported"),
    ("x6_diverged", "small", "refuted"),
    ("x7_unrun", "small, full", "not yet run"),
    ("x8_unfinished", "small", "not yet run"),
    ("x9_exact", "exact", "supported (exact)"),
    ("y1_broken", "exact", "refuted (exact)"),
    ("y2_drawn", "small", "supported"),
]


class Page(HTMLParser):
    """All tags, the ids, the text, and the rows of the first table: lists of cells with the links in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.anchors: list[str] = []
        self._in_first_table = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_first_table |= tag == "table" and not self.rows
        if not self._in_first_table:
            return
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "a":
            self.anchors.append(str(dict(attrs)["href"]))

    def handle_endtag(self, tag: str) -> None:
        self._in_first_table &= tag != "table"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_first_table and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def verdicts(self) -> list[tuple[str, str, str, str]]:
        """Argument, scale, verdict and effects."""
        rows = [[cell.strip() for cell in row] for row in self.rows[1:]]
        return [(at[1:], row[4], row[1], row[2]) for at, row in zip(self.anchors, rows, strict=True)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with made-up results, their report, and a README."""
    folder = tmp_path_factory.mktemp("made")
    write_results(folder)
    (folder / "README.md").write_text(f"# One\n{BEGIN}\n{END}\nThe end.\n")
    assert report(CLAIMS, folder, folder, folder / "README.md", check=False) == 0
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the report of `FEW` alone, which is quicker to compute."""
    folder = tmp_path_factory.mktemp("few")
    write_results(folder)
    (folder / "README.md").write_text(f"# One\n{BEGIN}\n{END}\nThe end.\n")
    assert report(FEW, folder, folder, folder / "README.md", check=False) == 0
    return folder


@pytest.fixture
def copy(few: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    shutil.copytree(few, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def page(made: Path) -> Page:
    return Page((made / "report.html").read_text())


def judged(folder: Path, scale: Scale) -> dict[str, ClaimVerdict]:
    """By hand: each claim's own verdict, then Holm."""
    alone = {}
    for claim in CLAIMS:
        rows = read_rows(folder / scale / f"{claim.id}.csv")
        if rows and claim is not UNFINISHED:
            alone[claim.id] = claim.judge(rows)
    return correct(alone)


def test_every_verdict_there_is_is_shown(page: Page):
    assert [row[:3] for row in page.verdicts()] == EXPECTED


@pytest.mark.parametrize("scale", ["small", "full"])
def test_verdicts_and_effects_of_the_page_are_those_of_the_tables(made: Path, page: Page, scale: Scale):
    shown = {claim_id: (verdict, effect) for claim_id, at, verdict, effect in page.verdicts() if at == scale}
    found = judged(made, scale)
    assert set(shown) - set(found) <= {UNFINISHED.id}
    for claim_id, verdict in found.items():
        said, effects = shown[claim_id]
        assert said == verdict.kind
        # Arm minus control: all of these measurements are losses, of which less is better.
        possible = [[-v.effect, -v.high, -v.low] for v in verdict.by_setting.values()]
        for line in effects.split("\n"):
            numbers = [float(text) for text in re.findall(r"[-+]\d+\.\d+", line.replace("\N{MINUS SIGN}", "-"))]
            assert any(numbers == pytest.approx(each, abs=0.0006) for each in possible), (claim_id, line)
        assert len(effects.split("\n")) == (2 if verdict.kind == "mixed" else 1)


def test_a_verdict_that_is_lost_among_so_many_says_so(made: Path, page: Page):
    row = next(row for row in page.rows if row[0].startswith("X4"))
    alone = LOST.judge(read_rows(made / "small" / f"{LOST.id}.csv"))
    assert alone.kind == "supported"
    assert f"supported on its own (p = {alone.p:.2g}) but not among 9 arguments" in row[-1]
    assert re.search(r"\d+ seeds to stand among 9 arguments; there are 8", page.text)


@pytest.mark.parametrize(
    "said",
    [
        "6 of 8 runs of none diverged, 0 of 8 of ln (better was predicted)",
        "unfinished: argument x8_unfinished: no test_loss_nats of ln in char_lstm at seeds [3, 4, 5, 6, 7, 8]",
        "supported in 1 of 2, such as in char_lstm, ln against bn",
        "1 of 2 checks hold; broken: a statement <i>that is false</i>: 0.5, not <= 1e-09",
        "windows of 50 tokens, the state restarted with each",
        "1.71015 ± 0.00007",
        "2 of 2 diverged",
        "6 of 8 (41% to 93%)",
        "scale full says refuted",
        "scale full is not yet run",
        "seeds would decide (80 % power at this spread); there are 8",
        "fixed at commit abcdef0, unchanged since its verdict runs began",
        "fixed at commit abcdef0, CHANGED after its verdict runs began",
        "trained at commit 1234567 on 2-core x86_64, 24 GiB",
    ],
)
def test_the_page_says(page: Page, made: Path, said: str):
    assert said in page.text.replace("\N{NO-BREAK SPACE}", " ")
    read = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render((made / "report.md").read_text()))
    assert said in read.text.replace("\N{NO-BREAK SPACE}", " ")


def test_the_readme_has_the_same_rows(made: Path, page: Page):
    table = (made / "README.md").read_text().split(BEGIN)[1].split(END)[0].strip().split("\n")
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table[2:-2]]
    shown = [(re.search(r"#(\w+)\)", row[0])[1], row[4].strip(), row[1].replace("*", "").strip()) for row in rows]  # pyright: ignore[reportOptionalSubscript]
    assert shown == EXPECTED
    assert "](report.md#d2_shared" in rows[0][0]
    assert (made / "README.md").read_text().endswith("The end.\n")


def change_a_number(path: Path) -> None:
    text = path.read_text()
    number = re.search(r"\d\.\d\d(?=\d*,)", text)
    assert number is not None
    path.write_text(text.replace(number[0], f"{float(number[0]) + 0.5:.2f}", 1))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: change_a_number(f / "small" / f"{REFUTED.id}.csv"), "report.html disagrees with the results: line"),
        (lambda f: (f / "exact.json").unlink(), "report.html disagrees"),
        (lambda f: (f / "small" / f"{DRAWN.id}.probes.csv").unlink(), "report.html disagrees"),
        (lambda f: (f / "small" / "d4_ln_solves_it.json").unlink(), "report.html disagrees"),
        (lambda f: (f / "report.md").write_text("# Which"), "report.md disagrees"),
        (lambda f: (f / "report.md").unlink(), "report.md is missing"),
        (lambda f: (f / "README.md").write_text(f"{BEGIN}\nall supported\n{END}"), "README.md disagrees"),
        (lambda f: (f / "figures" / f"small-{DRAWN.id}-1.svg").unlink(), "figures has not the figures of the results"),
        (lambda f: (f / "figures" / "old.svg").write_text("<svg/>"), "figures of the results: old"),
    ],
)
def test_check_names_what_disagrees(
    copy: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], named: str
):
    def check() -> int:
        return report(FEW, copy, copy, copy / "README.md", check=True)

    assert check() == 0
    assert "say what the tables do" in capsys.readouterr().out
    spoil(copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert check() == 1
    said = capsys.readouterr().out
    assert named in said
    assert said.count("\n") == 1
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_the_committed_report_and_readme_agree_with_the_results(capsys: pytest.CaptureFixture[str]):
    claims = [load_claim(name) for name in available_claims()]
    assert report(claims, ROOT / "results", ROOT / "results", ROOT / "README.md", check=True) == 0, capsys.readouterr()


def test_the_page_asks_nobody_for_anything(made: Path, page: Page):
    text = (made / "report.html").read_text()
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
                assert value is not None
                assert value.startswith(("#", "https://arxiv.org/abs/")), (name, value)
    assert not {"script", "link", "img", "iframe", "object", "image"} & {tag for tag, _ in page.tags}
    assert not re.search(r"@import|url\((?!#)", text)


def test_phones_and_dark_rooms_are_thought_of(made: Path, page: Page):
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "@media (prefers-color-scheme: dark)" in (made / "report.html").read_text()


def test_names_are_shown_and_not_obeyed(made: Path, page: Page):
    assert NASTY in page.text
    assert not [tag for tag, attributes in page.tags if tag in ("b", "i", "script") or "onmouseover" in attributes]
    # As much of it as a figure has room for.
    assert page.text.count("<b onmouseover") > 10
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render((made / "report.md").read_text())
    read = Page(rendered)
    assert NASTY in read.text
    assert not [tag for tag, attributes in read.tags if tag in ("b", "i", "script") or "onmouseover" in attributes]


def test_tags_are_closed_and_ids_stand_once(made: Path, page: Page):
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    inner = {value[1:] for _, attributes in page.tags for name, value in attributes.items() if value and name == "href"}
    assert {name for name in inner if "_" in name} <= set(ids)
    text = (made / "report.html").read_text()
    for tag in ("div", "table", "tr", "td", "section", "figure", "details", "svg", "ul", "li"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


def test_figures_are_text_in_the_colour_of_the_page(made: Path):
    for path in (made / "figures").glob("*.svg"):
        text = path.read_text()
        assert "<text" in text
        assert "currentColor" in text
        assert "#0a0b0c" not in text
        assert "<metadata" not in text
        assert text.count("http") == text.count("http://www.w3.org/"), "nothing is fetched"


def test_the_report_is_small_enough_to_commit(made: Path):
    sizes = {path.name: path.stat().st_size for path in made.rglob("*") if path.is_file()}
    assert max(size for name, size in sizes.items() if name.endswith(".csv")) < 200_000
    assert max(size for name, size in sizes.items() if name.endswith(".svg")) < 60_000


def test_another_process_writes_the_same_bytes_without_torch(few: Path, tmp_path: Path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from made_up import FEW; from normlab.report.command import report\n"
        "report(FEW, Path(sys.argv[2]), Path(sys.argv[3]), None, check=False)\n"
        "heavy = {'torch', 'pytorch_lightning', 'wandb', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(few), str(tmp_path)]
    subprocess.run(arguments, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert {Path("report.html"), Path("report.md")} < set(written)
    for name in written:
        assert (tmp_path / name).read_bytes() == (few / name).read_bytes(), name


def test_checking_needs_no_matplotlib(few: Path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['matplotlib'] = None\n"
        "from pathlib import Path; from made_up import FEW; from normlab.report.command import report\n"
        "sys.exit(report(FEW, Path(sys.argv[2]), Path(sys.argv[2]), None, check=True))"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(few)], check=True)


def test_old_figures_go(copy: Path):
    (copy / "figures" / "old.svg").write_text("<svg/>")
    report(INVENTED[:1], copy, copy, None, check=False)
    assert {path.stem for path in (copy / "figures").glob("*.svg")} == {f"small-{REFUTED.id}-{n}" for n in (1, 2, 3)}


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (f"small/{REFUTED.id}.csv", "has other columns"),
        (f"small/{REFUTED.id}.curves.csv", "has other columns"),
        (f"small/{DRAWN.id}.probes.csv", "has other columns"),
        (f"small/{REFUTED.id}.json", "is not JSON"),
        ("exact.json", "is not JSON"),
    ],
)
def test_a_damaged_file_gets_one_line(copy: Path, file: str, said: str):
    (copy / file).write_text("nothing\n")
    with pytest.raises(InputError, match=said) as caught:
        report(FEW, copy, copy, None, check=True)
    assert file.rpartition("/")[2] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 2
    assert "there is no README.md; run this in the repository, or give --readme=none" in capsys.readouterr().err
    Path("README.md").write_text("no place")
    assert main(["report"]) == 2
    assert "README.md has no place for the verdicts" in capsys.readouterr().err
    assert not list(tmp_path.glob("results/*"))
    assert main(["report", "--readme=none", "--output=page", "--check"]) == 1
    assert "page/report.html is missing: make report" in capsys.readouterr().out
    assert main(["report", "--readme=none", "--output=page"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("wrote page/report.html, page/report.md: 0 supported")
    assert said.count("\n") == 1
    assert main(["report", "--readme=none", "--output=page", "--check"]) == 0


def test_runs_of_another_plan_are_named(copy: Path):
    table = copy / "small" / f"{REFUTED.id}.csv"
    table.write_text(re.sub(r"(,verdict,.*)lstm-", r"\1gru-", table.read_text()))
    report((REFUTED,), copy, copy, None, check=False)
    text = (copy / "report.html").read_text()
    assert "16 verdict runs of the table are not those that it plans now; make study" in text
    assert "refuted" not in Page(text).verdicts()[0][1]


def test_an_effect_is_shown_in_the_measurements_own_direction(tmp_path: Path):
    """LN's loss is higher by 0.03, so that the effect is positive; where higher is better it is good news."""
    import dataclasses

    def effect(claim: Claim) -> tuple[str, str]:
        rows = make_rows(claim, "small", lambda s, arm, m, seed: 1 + 0.03 * (arm == "ln") + seed / 1e5 * (arm == "ln"))
        write_rows(tmp_path / "small" / f"{claim.id}.csv", rows)
        report((claim,), tmp_path, tmp_path, None, check=False)
        (row,) = Page((tmp_path / "report.html").read_text()).verdicts()
        return row[2], row[3].replace("\N{NO-BREAK SPACE}", " ")

    assert effect(REFUTED) == ("refuted", "+0.0300 [+0.0300, +0.0301] nats")
    higher = dataclasses.replace(REFUTED.measurements[0], lower_is_better=False)
    assert effect(dataclasses.replace(REFUTED, measurements=(higher,)))[0] == "supported"


def test_every_norm_has_a_colour_that_is_seen_on_both_pages():
    colours = norm_colours()
    assert set(colours) == set(available_norms())
    assert len(set(colours.values())) == len(colours)

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for norm, colour in colours.items():
        for ground in ("#f5f7f9", "#1c2127"):
            light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3, (norm, colour, ground)
