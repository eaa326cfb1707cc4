"""One idea: numbers in columns, for the terminal and for a Markdown page."""


def table(header, rows):
    """A header and rows of strings -> text in columns: words on the left, numbers on the right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    right = numbers(rows, len(header))
    return "\n".join("  ".join(cell.rjust(width) if number else cell.ljust(width)
                               for cell, width, number in zip(line, widths, right)).rstrip() for line in lines)


def markdown(header, rows):
    """The same as a Markdown table."""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (header, *rows)]
    rule = ["---:" if number else "---" for number in numbers(rows, len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def numbers(rows, columns):
    """Which columns hold nothing but numbers, dashes and empty cells."""
    return [bool(rows) and all(not row[i] or row[i][0] in "-+0123456789" for row in rows) for i in range(columns)]
