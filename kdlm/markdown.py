"""Markdown: tables."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int | None = None) -> str:
    """Return a table, without a line break at its end; all but the first `words` columns are numbers, aligned right."""
    words = len(head) if words is None else words
    rule = ["---" if place < words else "---:" for place in range(len(head))]
    return "\n".join([_row(head), f"|{'|'.join(rule)}|", *map(_row, rows)])


def _row(cells: Sequence[str]) -> str:
    escaped = (" ".join(cell.replace("|", "\\|").splitlines()) for cell in cells)
    return f"| {' | '.join(escaped)} |"
