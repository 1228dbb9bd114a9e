"""What is printed: names and reasons may come from somebody else's record or corpus and must not steer the terminal."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.text import Text

__all__ = ["PlainConsole", "printable"]

# Control characters (escape sequences begin with one), line and paragraph separators, marks that turn the direction of
# writing and so can show another text than there is, and halves of surrogate pairs, which no terminal can be sent.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_BUT_LAYOUT = re.compile("(?![\n\t])" + _UNSAFE.pattern)


def printable(text: str, *, lines: bool = False) -> str:
    """`text` in one line, with what would steer a terminal written as Python writes it in a string, such as \\x1b.

    Args:
        lines: leave line ends and tabs.
    """
    unsafe = _UNSAFE_BUT_LAYOUT if lines else _UNSAFE
    return unsafe.sub(lambda found: repr(found[0])[1:-1], text)


class PlainConsole(Console):
    """Prints text as it is: no markup, emoji codes or coloured numbers in it, and nothing that steers the terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string comes by here, on its way from `print` or a table's cell."""
        return super().render_str(printable(text, lines=True), **options)
