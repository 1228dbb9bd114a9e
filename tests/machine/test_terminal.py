"""Text of somebody else does not steer the terminal."""

from __future__ import annotations

import io

import pytest
from rich.table import Table

from normlab.machine.terminal import PlainConsole, printable

STEERING = "\x1b[2J\x1b]8;;http://x\x07 \x9b1m \r \x00 \u202e \udcff"


def test_what_steers_is_written_out() -> None:
    assert printable("a\x1b[31m\nb\u202ec") == r"a\x1b[31m\nb\u202ec"
    assert printable("a\tb\nc\r", lines=True) == "a\tb\nc" + r"\r"
    plain = "naïve Ünïcode 中文 👩\u200d🔬 \\ ' \""
    assert printable(plain) == plain


@pytest.mark.parametrize("how", ["print", "cell"])
def test_a_console_prints_text_as_it_is(how: str) -> None:
    out = io.StringIO()
    console = PlainConsole(file=out, width=500, force_terminal=True, color_system="truecolor")
    text = f"[bold]b[/bold] [link=http://x]x[/link] :smile: 12.5 {STEERING}"
    if how == "print":
        console.print(text)
    else:
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_row(text)
        console.print(table)
    shown = out.getvalue()
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\x00", "\r", "\u202e", "\udcff"}
    assert shown.strip().startswith(
        "[bold]b[/bold] [link=http://x]x[/link] :smile: 12.5 " + r"\x1b[2J\x1b]8;;http://x\x07"
    )
