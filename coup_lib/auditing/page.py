"""An audit's figure, and its page as one HTML file that needs no other."""

import base64
from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import mistune
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from coup_lib.auditing.protocol import AuditSettings
from coup_lib.evaluation.config import NORM_NAMES, radius
from coup_lib.files import write_atomically
from coup_lib.reporting.plots import PALETTE, points, use_style
from coup_lib.reporting.tables import Row

LOOKS = "osDXp^vP*<>"  # markers, in the order of the defences
HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Audit</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left }}
img {{ max-width: 100% }}
</style>
{body}
</html>
"""


def figure(
    rows: Sequence[Row],
    labels: Sequence[str],
    eps: Mapping[str, Mapping[float, np.ndarray]],
    settings: AuditSettings,
) -> Figure:
    """Accuracy under every attack, and against the radius.

    rows: of the defences. labels: what attacks are called, from top to bottom; the last but one is the worst
    case. eps: as `Measured` has it.
    """
    use_style()
    drawn, (under, larger) = plt.subplots(
        1, 2, figsize=(9.5, 1.2 + 0.24 * len(labels)), width_ratios=(3, 2), layout="constrained"
    )
    for place, (row, offset) in enumerate(zip(rows, np.linspace(-0.25, 0.25, len(rows)), strict=True)):
        name, marker = row.label, LOOKS[place % len(LOOKS)]
        look: dict[str, Any] = {"color": PALETTE[place % len(PALETTE)], "markersize": 4.5}
        places = [labels.index(label) + offset for label in row.right]
        points(under, places, [*row.right.values()], sideways=True, fmt=marker, label=name, **look)
        by_radius = eps.get(name, {})
        if by_radius:
            places = np.arange(len(by_radius)) + 0.3 * offset
            points(larger, places, [*by_radius.values()], fmt=f"{marker}-", **look)
            ticks = [radius(value) for value in by_radius]
            larger.set_xticks(range(len(ticks)), ticks)
    under.axhspan(len(labels) - 2.5, len(labels) - 1.5, color="#fff3c4", zorder=-1)
    under.set_yticks(range(len(labels)), labels)
    under.set(xlim=(-2, 102), ylim=(len(labels) - 0.5, -0.5))
    under.set_xlabel(f"accuracy (%), one draw, n = {settings.n_images}, 95 % interval")
    under.grid(visible=False, axis="y")
    larger.set(ylim=(-2, 102), ylabel="accuracy (%), 95 % interval")
    larger.set_xlabel(f"{NORM_NAMES[settings.norm]} radius, under APGD-ce")
    drawn.legend(loc="outside upper center", ncols=min(len(rows), 4))
    return drawn


def write(folder: Path, text: str, drawn: Figure, frame: pd.DataFrame) -> Path:
    """Write audit.md, audit.csv, audit.png and audit.html into the folder; the path of the last one."""
    image = BytesIO()
    drawn.savefig(image, format="png", dpi=200)
    plt.close(drawn)
    png = image.getvalue()
    files = {
        "audit.md": text.encode(),
        "audit.csv": frame.to_csv(index=False).encode(),
        "audit.png": png,
        "audit.html": html_page(text, {"audit.png": png}).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, partial(Path.write_bytes, data=content))
    return folder / "audit.html"


def html_page(text: str, images: dict[str, bytes]) -> str:
    """Markdown as HTML; images: file → PNG, which takes the place of the file."""
    for file, png in images.items():
        text = text.replace(f"]({file})", f"](data:image/png;base64,{base64.b64encode(png).decode()})")
    return HTML.format(body=mistune.create_markdown(plugins=["table"])(text))
