"""One look for every figure: fonts, sizes, colours; the same colour for the same defence everywhere."""

from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

from coup_lib import paths

_palette = sns.color_palette("colorblind")
COLOURS = {
    "none": _palette[7],
    "diffpure": _palette[0],
    "reverse": _palette[1],
    "coup": _palette[2],
}
LABELS = {
    "none": "No defence",
    "diffpure": "DiffPure",
    "reverse": "COUP w/o guidance",
    "coup": "COUP",
}


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
            # No creation date: the same records give the same file.
            "svg.hashsalt": "coup",
        }
    )


def save(figure: Figure, profile: str, name: str) -> Path:
    """Write figures/<profile>/<name>.pdf and .png and return the path of the PNG."""
    folder = paths.FIGURES / profile
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    return folder / f"{name}.png"
