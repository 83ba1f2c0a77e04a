"""Figures as PNG files, without a display."""

from pathlib import Path
from typing import TYPE_CHECKING

from lib.data.events import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_plot(path: Path | None) -> None:
    """Refuse a name that is no PNG file's, before anything is computed.

    Raises:
        InputError: it does not end in .png.
    """
    if path is not None and path.suffix.lower() != ".png":
        raise InputError(f"plot: {path} is no PNG file; give a name that ends in .png")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG file; folders on the way are made.

    Raises:
        InputError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise InputError(f"plot: {path} cannot be written ({error.strerror}); name another file") from error
