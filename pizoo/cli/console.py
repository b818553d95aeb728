"""What commands print: lines, and tables that fit the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

NAME_WIDTH, COLUMN_GAP = 25, 2  # characters: of the longest entry's name; between columns

out = Console()
err = Console(stderr=True)
if not out.is_terminal:
    out = Console(width=120)  # logs and pipes have no width of their own


def say(text: str, highlight: bool = True) -> None:
    """Print a line whole: brackets in it are no markup, and no terminal's width breaks a path."""
    out.print(text, markup=False, highlight=highlight, soft_wrap=True)


def percent(value: float | None, error: float | None = None) -> str:
    """An accuracy as tables show it, with its error if there is one."""
    return "–" if value is None else f"{value:.2f}" + ("" if error is None else f" ± {error:.2f}")


def print_splits(rows: Iterable[tuple[str, dict[str, Any]]], headline: str) -> None:
    """Few-shot accuracy of nets on every split, the entry's own number marked."""
    from pizoo.evaluation.fewshot import TaskAccuracy

    cells = []
    for name, splits in rows:
        for split, values in splits.items():
            found, mark = TaskAccuracy(**values), " (the entry's number)" if split == headline else ""
            cells.append((name, split + mark, f"{found.tasks:,}", percent(found.accuracy, found.half_width)))
    print_table(("entry", "classes", "tasks", "accuracy (95 %)"), cells)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str | None = "accuracies in percent",
    least: Sequence[str] = (),
) -> None:
    """Print a table. Nothing is cut, and no word broken: names too long for the first column go on in the next line.

    Args:
        least: columns to leave out, in this order, where a terminal is too narrow for all.
    """
    first, *rest = columns
    rows = [dict(zip(columns, row, strict=False)) for row in rows]  # of fewer classes than columns there may be fewer
    longest = max((len(row[first]) for row in rows), default=0)

    def widths(shown: list[str], one_line: bool = False) -> dict[str, int]:
        return {column: _column_width(column, [row.get(column, "") for row in rows], one_line) for column in shown}

    def room(shown: list[str], one_line: bool = False) -> int:
        return out.width - sum(width + COLUMN_GAP for width in widths(shown, one_line).values())

    shown, wanted = rest, min(longest, NAME_WIDTH)
    for column in least:
        if room(shown) < wanted:
            shown = [other for other in shown if other != column]
    # Headers go on in the next line before anything else does.
    fixed = widths(shown) if room(shown) >= wanted and room(shown, one_line=True) < longest else {}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in shown:
        table.add_column(column, overflow="fold", width=fixed.get(column))
    width = max(room(shown), wanted // 2)
    for row in rows:
        folded = "\n".join(row[first][i : i + width] for i in range(0, len(row[first]), width))
        table.add_row(escape(folded), *(row.get(column, "") for column in shown))
    out.print()
    out.print(table)
    missing = [column for column in rest if column not in shown]
    notes = [*([caption] if caption else []), *([f"no room here for: {', '.join(missing)}"] if missing else [])]
    out.print(f"\n[dim italic]{'; '.join(notes)}[/]" if notes else "")


def _column_width(header: str, cells: Iterable[str], one_line: bool) -> int:
    """Characters that a column needs for its cells whole, and its header in one line or a word in each."""
    head = [header] if one_line else header.split()
    return max(len(part) for part in (*head, *(Text.from_markup(cell).plain for cell in cells)))
