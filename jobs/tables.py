"""Tables for the terminal: what is wider than the terminal goes on in a further table, and no cell is ever broken."""

import shutil
from collections.abc import Iterable, Sequence

UNLIMITED = 10_000  # characters, where the output is no terminal
GAP = "  "


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", texts: int = 1, width: int | None = None
) -> None:
    """Print rows of cells, which may have several lines each, under the names of their columns.

    Args:
        columns: their names, as many as a row has cells.
        rows: the cells.
        title: a line above.
        texts: how many of the first columns are aligned to the left, as texts are; the others are numbers.
        width: characters of a line; those of the terminal by default.
    """
    width = width or shutil.get_terminal_size((UNLIMITED, 24)).columns
    table = [[cell.splitlines() or [""] for cell in row] for row in (columns, *rows)]
    widths = [max(len(line) for row in table for line in row[column]) for column in range(len(columns))]
    for part in _parts(widths, width):
        if title:
            print(title)
        for number, row in enumerate(table):
            height = max(len(row[column]) for column in part)
            for line in range(height):
                aligned = (_aligned(row[column], line, widths[column], column < texts) for column in part)
                print(GAP.join(aligned).rstrip())
            if number == 0:
                print(GAP.join("-" * widths[column] for column in part))
        print()


def print_facts(facts: Iterable[tuple[str, object]], title: str) -> None:
    """Print names and values, a line each; a value is never broken, so that it can be copied."""
    lines = [(name, str(value)) for name, value in facts]
    longest = max((len(name) for name, _ in lines), default=0)
    print(title)
    for name, value in lines:
        print(f"{GAP}{name:<{longest}}{GAP}{value}")
    print()


def _parts(widths: Sequence[int], width: int) -> list[list[int]]:
    """Divide columns so that each part fits into a line; all of them begin with the first column."""
    parts, room = [[0]], width - widths[0]
    for column in range(1, len(widths)):
        needed = len(GAP) + widths[column]
        if needed > room and len(parts[-1]) > 1:
            parts.append([0])
            room = width - widths[0]
        parts[-1].append(column)
        room -= needed
    return parts


def _aligned(lines: Sequence[str], line: int, width: int, text: bool) -> str:
    own = lines[line] if line < len(lines) else ""
    return own.ljust(width) if text else own.rjust(width)
