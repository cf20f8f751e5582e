"""Tables in one place: plain text for a terminal, Markdown for a page, HTML for a notebook.

The layout is the work of `tabulate`. This module says only which columns hold numbers: those are flush right.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from tabulate import tabulate

Rows = Sequence[Sequence[str]]


def text_table(heads: Sequence[str], rows: Rows) -> str:
    """Return aligned columns, two spaces apart, with a rule below the heads.

    >>> print(text_table(["class", "bytes"], [["weights", "1,024"], ["adapters", "64"]]))
    class     bytes
    ---------------
    weights   1,024
    adapters     64
    """
    table = tabulate(
        [heads, *rows], tablefmt="plain", disable_numparse=True, colalign=_alignment(heads, rows)
    )
    head, *body = (line.rstrip() for line in table.splitlines())
    return "\n".join([head, "-" * max(map(len, (head, *body))), *body])


def markdown_table(heads: Sequence[str], rows: Rows) -> str:
    """Return a Markdown table whose columns line up as plain text too.

    >>> print(markdown_table(["method", "loss"], [["LoRA", "0.31"]]))
    | method   |   loss |
    |:---------|-------:|
    | LoRA     |   0.31 |
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (heads, *rows)]
    return tabulate(
        cells[1:], cells[0], tablefmt="pipe", disable_numparse=True, colalign=_alignment(heads, rows)
    )


def html_table(caption: str, heads: Sequence[str], rows: Rows) -> str:
    """Return an HTML table with a caption, everything escaped.

    >>> html_table("Sizes", ["a"], [["1 < 2"]]).splitlines()[:2]
    ['<table>', '<caption>Sizes</caption>']
    """
    table = tabulate(rows, heads, tablefmt="html", disable_numparse=True, stralign=None)
    return str(table).replace("<table>", f"<table>\n<caption>{html.escape(caption)}</caption>", 1)


def _alignment(heads: Sequence[str], rows: Rows) -> list[str]:
    """Return "right" for a column in which most cells start with a number; dashes do not count."""
    sides = []
    for column in range(len(heads)):
        cells = [row[column] for row in rows if re.search(r"\w", row[column])]
        numbers = [cell for cell in cells if re.match(r"\W*\d", cell)]
        sides.append("right" if 2 * len(numbers) > len(cells) else "left")
    return sides
