"""Print figures as Markdown tables, ready for a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is aligned to the left and whose others are aligned to the right."""
    body = [list(row) for row in rows]
    widths = [max(len(line[column]) for line in [list(titles), *body]) for column in range(len(titles))]

    def line_of(cells: Sequence[str]) -> str:
        padded = [
            cells[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line_of(titles), f"| {' | '.join(rule)} |", *(line_of(row) for row in body)])


def number(value: float) -> str:
    """Return a figure with three digits that mean something: 0.123, 1.23, 12.3, 123, 12,345."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"
