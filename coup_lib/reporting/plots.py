"""One look for every figure: fonts, sizes, colours; the same colour for the same defence everywhere."""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from string import ascii_lowercase
from textwrap import fill
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from coup_lib import paths
from coup_lib.evaluation.outcomes import Accuracy
from coup_lib.files import write_atomically
from coup_lib.reporting import publishing
from coup_lib.reporting.tables import Row

if TYPE_CHECKING:  # a machine that only computes need not have IPython
    from IPython.display import Image as Shown

PALETTE = sns.color_palette("colorblind")
COLOURS = {
    "none": PALETTE[7],
    "diffpure": PALETTE[0],
    "reverse": PALETTE[1],
    "coup": PALETTE[2],
    "averaged": PALETTE[9],
}
MARKERS = {"none": "X", "diffpure": "o", "reverse": "s", "coup": "D", "averaged": "p"}
MOST_BYTES = 150_000  # of a PNG
# In a PNG, and how they are chosen: as suits a photograph, or if that is too large as suits lines.
COLOURS_KEPT = ((128, Image.Quantize.MEDIANCUT), (64, Image.Quantize.MAXCOVERAGE))


def use_style() -> None:
    """Set the shared matplotlib and seaborn style; call it once at the top of a notebook."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind", font_scale=1.1)
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 220,
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "pdf.fonttype": 42,
        }
    )


def save(figure: Figure, profile: str, name: str, alt: str) -> "Shown":
    """Write figures/<profile>/<name>.png and return its `picture`; with COUP_PDF write a PDF, too."""
    folder = paths.FIGURES / profile
    folder.mkdir(parents=True, exist_ok=True)
    shown = picture(figure, alt)
    write_png = partial(Path.write_bytes, data=shown.data)
    write_atomically(publishing.note(folder / f"{name}.png"), write_png)
    if os.environ.get(paths.PDF_VARIABLE):  # without a creation date: the same records give the same file
        write_pdf = partial(figure.savefig, format="pdf", metadata={"CreationDate": None})
        write_atomically(folder / f"{name}.pdf", write_pdf)
    return shown


def picture(figure: Figure, alt: str) -> "Shown":
    """The figure, closed, as a PNG for a notebook's last line; Jupyter and the site show the same bytes.

    It has as many of `COLOURS_KEPT` as `MOST_BYTES` allow: of a photograph it takes close looking to tell,
    and the file is a third of the size.

    Args:
        alt: what is shown, for readers who cannot see it.
    """
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    plt.close(figure)
    image = Image.open(drawn).convert("RGB")
    for colours, method in COLOURS_KEPT:
        written = BytesIO()
        image.quantize(colours, method, dither=Image.Dither.NONE).save(written, format="png", optimize=True)
        if written.tell() <= MOST_BYTES:
            break
    from IPython.display import Image as Shown

    return Shown(written.getvalue(), width=image.width // 2, alt=alt)


def estimates(axes: Axes, places: Any, found: Sequence[Any], *, sideways: bool = False, **look: Any) -> None:
    """Estimates with their intervals at these places (k,); sideways: along the horizontal axis.

    Args:
        found: with a value, low and high each, such as `Accuracy` and `Difference`.
        look: of `Axes.errorbar`.
    """
    values = np.array([one.value for one in found])
    errors = np.abs(np.array([[one.low, one.high] for one in found]).T - values)
    where = (
        {"x": values, "y": places, "xerr": errors} if sideways else {"x": places, "y": values, "yerr": errors}
    )
    axes.errorbar(**where, **{"markersize": 5, "capsize": 2, "linewidth": 1.1} | look)


def points(
    axes: Axes, places: Any, shares: Sequence[np.ndarray], *, sideways: bool = False, **look: Any
) -> None:
    """Accuracies in percent at these places (k,), with 95 % intervals; see `estimates`.

    Args:
        shares: k times the share of right draws of each image, (n,).
    """
    estimates(axes, places, [Accuracy.of(share) for share in shares], sideways=sideways, **look)


def band(
    axes: Axes, x: Any, middle: np.ndarray, edges: Sequence[np.ndarray], style: str, colour: Any, **look: Any
) -> None:
    """A line (k,) at x (k,) inside a shaded band between two edges (k,); look: of `Axes.plot`."""
    low, high = edges
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(x, middle, style, color=colour, **{"markersize": 4} | look)


def titles(panels: Iterable[Axes], names: Iterable[str]) -> None:
    """Above each panel its letter and its name."""
    for letter, (axes, name) in zip(ascii_lowercase, zip(panels, names, strict=True), strict=False):
        axes.set_title(f"({letter}) {name}", loc="left", fontsize="medium")


def robustness_panel(axes: Axes, rows: Sequence[Row], columns: Mapping[Any, str], width: int = 12) -> None:
    """One group per column, one marker per row of a table with its 95 % interval, in percent.

    Args:
        columns: the columns to show, with their labels.
        width: of a label's line, in characters.
    """
    for offset, row in zip(np.linspace(-0.24, 0.24, len(rows)), rows, strict=True):
        look = {
            "fmt": MARKERS.get(row.keys["defence"], "^"),
            "color": COLOURS.get(row.keys["defence"], PALETTE[4]),
        }
        shares = [row.right[name] for name in columns]
        points(axes, np.arange(len(columns)) + offset, shares, label=row.label, **look)
    wrap = partial(fill, width=width, break_on_hyphens=False, break_long_words=False)
    groups(axes, [*map(wrap, columns.values())])
    axes.tick_params(axis="x", labelsize="small")
    place = axes.get_subplotspec()
    if place is None or place.is_first_col():
        axes.set_ylabel(f"accuracy (%), n = {rows[0].config.n_images}, 95 % interval")


def groups(axes: Axes, labels: Sequence[str]) -> None:
    """Labelled groups side by side, parted by lines, below accuracies in percent."""
    for edge in range(1, len(labels)):
        axes.axvline(edge - 0.5, color="0.88", linewidth=0.8, zorder=0)
    axes.set_xticks(range(len(labels)), labels)
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set(xlim=(-0.5, len(labels) - 0.5), ylim=(-2, 102))
