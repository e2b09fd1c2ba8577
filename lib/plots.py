"""One house style over matplotlib: colours that colour-blind readers can tell apart, alt texts."""

import base64
import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lib.errors import BookError

# Okabe and Ito's palette, black last.
COLOURS = {
    "blue": "#0072B2", "orange": "#E69F00", "green": "#009E73", "red": "#D55E00",
    "purple": "#CC79A7", "sky": "#56B4E9", "yellow": "#F0E442", "black": "#222222",
}  # fmt: skip
GREY = "#8A8A8A"  # for baselines and reference lines


def house_style() -> None:
    """Set matplotlib up for the book; importing this module does it."""
    matplotlib.rcParams.update(
        {
            "figure.figsize": (6.4, 3.2),
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "font.size": 10,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": matplotlib.cycler(color=list(COLOURS.values())),
            "axes.grid": True,
            "grid.color": "#E3E3E3",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "lines.linewidth": 1.6,
            "image.cmap": "viridis",
        }
    )


house_style()


def heatmap(ax: Axes, values, x=None, y=None, xlabel="", ylabel="", label="", center=None):
    """Draw ``values`` [rows, columns] on ``ax`` with a labelled colour bar.

    Args:
        x, y: tick labels of the columns and rows.
        label: what the colour means, with its unit.
        center: a value (0, say) that gets the middle of a diverging map.
    """
    values = np.asarray(values, dtype=float)
    style = {}
    if center is not None:
        reach = np.nanmax(np.abs(values - center)) or 1.0
        style = dict(cmap="RdBu_r", vmin=center - reach, vmax=center + reach)
    image = ax.imshow(values, aspect="auto", interpolation="nearest", **style)
    ax.grid(False)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if x is not None:
        ax.set_xticks(range(len(x)), x, rotation=60 if max(map(len, map(str, x))) > 3 else 0)
        if max(map(len, map(str, x))) > 3:
            plt.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor")
    if y is not None:
        ax.set_yticks(range(len(y)), y)
    ax.figure.colorbar(image, ax=ax, label=label)
    return image


def show(fig: Figure, alt: str, dpi: int = 110) -> None:
    """End a figure cell: display ``fig`` as a PNG with the alternative text ``alt``; close it.

    Args:
        alt: what a reader who cannot see the figure must know: what is drawn and what it shows.
    """
    if len(alt.split()) < 4:
        raise BookError("show needs an alt text: a sentence on what the figure shows")
    display({"image/png": png(fig, dpi)}, raw=True, metadata={"image/png": {"alt": alt}})


def png(fig: Figure, dpi: int = 110) -> str:
    """``fig`` as base64 PNG text; closes it."""
    buffer = io.BytesIO()
    # No metadata: the same figure gives the same bytes.
    fig.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    plt.close(fig)
    image = Image.open(buffer).convert("RGB")
    # Lines and letters on white need no more than a palette, which takes a third of the bytes. A
    # picture that holds photographs keeps its colours.
    if image.getcolors(2**13):
        image = image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
