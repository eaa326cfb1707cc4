"""Numbers in columns, for the terminal and for a Markdown page, and how far each of them can be trusted."""
import math

import numpy as np


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


FORMS = {"share": "{:.0%} ±{:.0f}", "number": "{:.2f} ±{:.2f}", "fine": "{:.4f} ±{:.4f}"}


def cell(found, form="number"):
    """(mean, low, high) -> the mean and half the width of its interval, as text; a dash for nothing measured."""
    if found is None:
        return "-"
    mean, low, high = found
    return FORMS[form].format(mean, (high - low) / 2 * (100 if form == "share" else 1))


# ---- how far to trust a number ---------------------------------------------------------------------------------------

def interval(values, n=1000, seed=0):
    """Numbers -> (mean, low, high): the mean and its 95 % interval, by the percentile bootstrap (Efron 1979).

    How much would the mean move if other rows had been drawn? Nobody can draw more rows, so the rows at hand are drawn
    again, `n` times, as many as there are, with replacement; 95 % of the means lie between low and high. The same
    values and seed give the same interval. One value, or all the same: low = mean = high, which says that the rows are
    too few to tell, not that the number is sure. No values: None, nothing was measured. Raises ValueError for NaN or
    infinity.
    """
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    if not len(values):
        return None
    if not np.isfinite(values).all():
        raise ValueError("an interval of numbers that are not finite")
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(n)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def sign_test(wins, losses):
    """Two-sided p: how likely is a result at least as uneven if each game is a fair coin? Ties are left out beforehand.

    Exact: p = 2 * sum_{k <= min(wins, losses)} C(n, k) / 2^n, at most 1. Without a game it is 1.
    """
    n = wins + losses
    at_most = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * at_most / 2 ** n)
