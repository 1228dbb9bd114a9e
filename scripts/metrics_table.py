"""Write docs/metrics.md from the list of what runs log, `normlab.records.metrics.METRICS`: make metrics"""

from __future__ import annotations

from pathlib import Path

from normlab.records.disk import write_atomically
from normlab.records.metrics import METRICS, WHEN

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
HEAD = """\
# What runs log

Made by `make metrics` from `src/normlab/records/metrics.py`, which a test holds against what runs log. `<...>` stands
for what a run decides: a site, a module's path, a layer, a multiple of the training length. Rows stand in
`metrics.jsonl` of a record, results in `outcome.json`, what probes found in `probes/<probe>.json` under the name after
the last `/`; in W&B all have the names below. An empty unit is a number without one.
"""


def page() -> str:
    """The text of docs/metrics.md."""
    text = [HEAD]
    for when, said in WHEN.items():
        text.append(f"## Logged {said}\n\n| name | unit | what |\n| --- | --- | --- |")
        text += [f"| `{each.name}` | {each.unit} | {_cell(each.meaning)} |" for each in METRICS if each.when == when]
        text.append("")
    return "\n".join(text)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


def main() -> None:
    write_atomically(PAGE, page())
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
