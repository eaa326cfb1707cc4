"""Pictures: one set-up for every figure. matplotlib is optional: what draws unasked looks with `available`."""
import importlib.util
from pathlib import Path

from common.disk import replacing
from common.errors import UserError


def available():
    return importlib.util.find_spec("matplotlib") is not None


def needed(flag):
    """Called first where somebody asks for a picture: raises UserError where matplotlib is missing."""
    if not available():
        raise UserError(f"{flag} needs matplotlib: pip install matplotlib, or leave the flag out")


def figure(columns=1, rows=1, width=4.2, height=3.2):
    """-> a figure, and its panels in reading order, each of width by height inches."""
    from matplotlib.figure import Figure  # not pyplot: that one looks for a display
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False).flatten()


def save(made, path):
    """Writes the figure into a file whose ending says how: .png, .pdf, .svg."""
    try:
        with replacing(path) as temporary:
            made.savefig(temporary, dpi=110, format=Path(path).suffix.removeprefix("."))
    except ValueError as error:  # an ending that matplotlib does not know
        raise UserError(f"{path} could not be drawn ({error}): give it a name as plot.png")
