"""Rows of plain numbers as Markdown tables."""


def markdown(rows: list[dict], columns: dict[str, str]) -> str:
    """An aligned Markdown table, and below it why a peer was not timed."""
    lines = []
    for row in rows:
        values = [form.format(row[name]) if row.get(name) is not None else "" for name, form in columns.items()]
        if row.get("problem"):  # "failed" or "missing" where the times would be
            values[1:] = [row["problem"].split(":")[0], *[""] * (len(values) - 2)]
        lines.append(values)
    notes = [f"- {row['peer']} {row['problem']}" for row in rows if row.get("problem")]
    return "\n".join([aligned([list(columns), *lines]), *(["", *notes] if notes else [])])


def aligned(lines: list[list[str]]) -> str:
    """A Markdown table of cells, the first line its head; every column but the first is right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    cells = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in (lines[0], rule, *lines[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
