"""The figures of the report, as SVG. Each function reads the run's numbers and gives a matplotlib figure."""
import base64
import io

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

__all__ = ["as_image", "expert_load", "learning"]

INK, SOFT, LINE = "#20262d", "#7a828c", "#e4e1da"
EXPERTS, DENSE, THIRD, FOURTH = "#0f766e", "#d9772b", "#5b5bd6", "#be3455"
STYLE = {"font.family": ["DejaVu Sans"], "font.size": 8.5, "axes.edgecolor": "#b9b5ab", "axes.labelcolor": SOFT,
         "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5,
         "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlecolor": INK, "axes.titlepad": 9,
         "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.7, "axes.axisbelow": True,
         "xtick.color": SOFT, "ytick.color": SOFT, "xtick.major.size": 0, "ytick.major.size": 0,
         "legend.frameon": False, "lines.linewidth": 1.8, "lines.solid_capstyle": "round",
         "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
         "svg.hashsalt": "numformer", "figure.constrained_layout.use": True}


def styled(draw):
    """`draw` with the report's style."""
    def with_style(*args, **kwargs):
        with pyplot.rc_context(STYLE):
            return draw(*args, **kwargs)
    with_style.__doc__ = draw.__doc__
    return with_style


def as_image(figure, alt):
    """A figure as an <img> that carries its own data."""
    stream = io.BytesIO()
    with pyplot.rc_context(STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return f'<img alt="{alt}" src="data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def _label(axes, x, y, text, colour, **options):
    axes.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", color=colour, va="center", fontsize=8,
                  annotation_clip=False, **options)


@styled
def learning(run):
    """Held-out bits a byte of both models against steps and against seconds, beside gzip and xz."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    data = run.results["data"]
    top = 0
    for name, colour in (("experts", EXPERTS), ("dense", DENSE)):
        stage = f"pretrain-{name}"
        seconds = np.cumsum([line["seconds"] for line in run.times[stage]])
        looks = [(line["step"], line["bits_per_byte"]) for line in run.log[stage] if "bits_per_byte" in line]
        steps, bits = np.array(looks).T
        top = max(top, bits[min(1, len(bits) - 1)])
        for axes, x in zip(panels, (steps + 1, seconds[steps.astype(int)])):
            axes.plot(x, bits, color=colour, marker="o", markersize=3.5, label=name)
            _label(axes, x[-1], bits[-1], f"{name} {bits[-1]:.2f}", colour)
    for axes, label in zip(panels, ("steps", "seconds of training")):
        for name in ("gzip", "xz"):
            axes.axhline(data[name], color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.text(0.995, data[name], f"{name} -9", color=SOFT, fontsize=7.5, ha="right", va="bottom",
                      transform=axes.get_yaxis_transform())
        axes.set_xlabel(label)
        axes.set_xlim(0, axes.get_xlim()[1] * 1.12)
        axes.set_ylim(top=top * 1.05)
    panels[0].set_title("Bits a byte on held-out files, by step")
    panels[1].set_title("The same by the clock")
    return figure


@styled
def expert_load(run):
    """The share of tokens each expert gets: at the end, and the largest over time."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 2.5), width_ratios=(1.15, 1))
    load = np.array(run.results["pretrain-experts"]["load"])
    layers, experts = load.shape
    left.imshow(load, cmap="GnBu", vmin=0, vmax=max(2.5 / experts, load.max()), aspect="auto")
    for (layer, expert), share in np.ndenumerate(load):
        left.text(expert, layer, f"{100 * share:.0f}", ha="center", va="center", fontsize=8,
                  color="white" if share > 1.7 / experts else INK)
    left.set_xticks(range(experts), range(1, experts + 1))
    left.set_yticks(range(layers), [f"layer {i + 1}" for i in range(layers)])
    left.set_xlabel("expert")
    left.set_title("Percent of the held-out tokens that each expert gets")
    left.grid(False)
    left.spines[:].set_visible(False)
    looks = [line for line in run.log["pretrain-experts"] if "held_out_load" in line]
    steps = [line["step"] + 1 for line in looks]
    shares = np.array([np.max(line["held_out_load"], axis=1) for line in looks])
    for layer in range(layers):
        right.plot(steps, 100 * shares[:, layer], color=pyplot.get_cmap("viridis")(layer / max(layers, 2) * 0.9),
                   linewidth=1.5, label=f"layer {layer + 1}")
    right.axhline(100 / experts, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
    right.text(0.995, 100 / experts, "even", color=SOFT, fontsize=7.5, ha="right", va="bottom",
               transform=right.get_yaxis_transform())
    right.set_ylim(0, None)
    right.set_xlabel("steps")
    right.set_title("The busiest expert of each layer, percent")
    right.legend(fontsize=7.5, ncols=2, loc="upper right")
    return figure
