"""The figures of the report, as SVG. Each function reads the run's numbers and gives a matplotlib figure."""
import base64
import io

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

__all__ = ["alignment", "as_image", "attention", "expert_load", "fine_tuning", "learning", "shrinking"]

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


def _label(axes, x, y, text, colour, up=0):
    axes.annotate(text, (x, y), xytext=(5, up), textcoords="offset points", color=colour, va="center", fontsize=8,
                  annotation_clip=False)


@styled
def learning(run):
    """Held-out bits a byte of both models against steps and against seconds, beside gzip and xz."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    data = run.results["data"]
    ends = {name: [line["bits_per_byte"] for line in run.log[f"pretrain-{name}"] if "bits_per_byte" in line]
            for name in ("experts", "dense")}
    top = 0
    for name, colour in (("experts", EXPERTS), ("dense", DENSE)):
        stage = f"pretrain-{name}"
        seconds = np.cumsum([line["seconds"] for line in run.times[stage]])
        looks = [(line["step"], line["bits_per_byte"]) for line in run.log[stage] if "bits_per_byte" in line]
        steps, bits = np.array(looks).T
        top = max(top, bits[min(1, len(bits) - 1)])
        for axes, x in zip(panels, (steps + 1, seconds[steps.astype(int)])):
            axes.plot(x, bits, color=colour, marker="o", markersize=3.5, label=name)
            # the higher of two ends has its name above, the other below
            rank = bits[-1] >= np.mean([lines[-1] for lines in ends.values()])
            _label(axes, x[-1], bits[-1], f"{name} {bits[-1]:.2f}", colour, up=6 if rank else -6)
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


@styled
def fine_tuning(run):
    """The losses of fine-tuning and of the reward model."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 2.5))
    lines = run.log["sft"]
    left.plot([line["step"] + 1 for line in lines], [line["loss"] for line in lines], color=LINE, linewidth=1.2)
    looks = [(line["step"] + 1, line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    result = run.results["sft"]
    steps, losses = np.array([(0, result["loss_before"]), *looks]).T
    left.plot(steps, losses, color=EXPERTS, marker="o", markersize=3.5)
    _label(left, steps[-1], losses[-1], f"{losses[-1]:.2f}", EXPERTS)
    left.set_xlabel("steps")
    left.set_title("Fine-tuning: nats a token of held-out completions")
    lines = run.log["reward"]
    steps = np.array([line["step"] + 1 for line in lines])
    accuracy = np.array([line["accuracy"] for line in lines])
    width = min(8, len(accuracy))
    smooth = np.convolve(accuracy, np.ones(width) / width, "valid")
    right.plot(steps, 100 * accuracy, ".", color=LINE, markersize=4)
    right.plot(steps[width - 1:], 100 * smooth, color=THIRD)
    held_out = 100 * run.results["reward"]["accuracy"]
    right.axhline(held_out, color=FOURTH, linewidth=1, linestyle=(0, (4, 3)))
    right.text(0.01, held_out, f"held-out pairs {held_out:.0f} %", color=FOURTH, fontsize=7.5, va="bottom",
               transform=right.get_yaxis_transform())
    right.axhline(50, color=SOFT, linewidth=0.9, linestyle=(0, (1, 3)))
    right.set_ylim(30, 102)
    right.set_xlabel("steps")
    right.set_title("Reward model: percent of pairs in the right order")
    return figure


@styled
def alignment(run):
    """PPO: rewards by iteration, the KL and its coefficient, and reward against KL beside best of n."""
    figure, (rewards, kl, against) = pyplot.subplots(1, 3, figsize=(9, 3.1), width_ratios=(1, 1, 1.25))
    lines, result = run.log["ppo"], run.results["ppo"]
    iteration = [line["step"] + 1 for line in lines]
    score = [line["objective/scores"] for line in lines]
    rewards.plot(iteration, score, color=THIRD, marker="o", markersize=3)
    rewards.set_title("Reward", color=THIRD)
    rewards.set_xlabel("iteration")
    _second(rewards, iteration, [line["program"] for line in lines], DENSE, "the program's score")
    kl.plot(iteration, [line["objective/kl"] for line in lines], color=EXPERTS, marker="o", markersize=3)
    kl.set_title("KL, nats a completion", color=EXPERTS)
    kl.set_xlabel("iteration")
    kl.set_ylim(bottom=0)
    _second(kl, iteration, [line["kl_coef"] for line in lines], DENSE, "its coefficient")

    against.plot([line["objective/kl"] for line in lines], score, color=THIRD, linewidth=1, alpha=0.35)
    against.scatter([line["objective/kl"] for line in lines], score, c=iteration, cmap="Purples", vmin=-len(lines) / 2,
                    s=18, zorder=3, label="PPO, by iteration")
    best = result["best_of_n"]
    against.plot([b["kl"] for b in best], [b["reward"] for b in best], color=FOURTH, marker="s", markersize=3.5,
                 linewidth=1.2, label="best of n")
    for b in best[1:]:
        against.annotate(str(b["n"]), (b["kl"], b["reward"]), xytext=(-2, 5), textcoords="offset points", fontsize=7.5,
                         color=FOURTH, ha="center")
    against.plot(result["kl"], result["reward"], marker="*", markersize=11, color=THIRD, linestyle="none",
                 label="PPO, held-out prompts")
    against.legend(fontsize=7.5, loc="lower right")
    against.set_title("Reward against KL")
    against.set_xlabel("KL to the fine-tuned model, nats")
    return figure


def _second(axes, x, y, colour, label):
    """A second scale on the right, in its own colour."""
    other = axes.twinx()
    other.plot(x, y, color=colour, linewidth=1.4, linestyle=(0, (5, 2)))
    other.grid(False)
    other.tick_params(colors=colour)
    other.set_ylim(0, max(max(y) * 1.25, 1e-9))
    other.spines["right"].set_visible(False)
    other.set_title(label, color=colour, loc="right", fontweight="normal", fontsize=8.5)


@styled
def attention(maps, importance, gone):
    """A thumbnail of every head's attention; heads that were pruned have a red frame."""
    heads = [(layer, head) for layer, some in enumerate(maps) for head in range(len(some))]
    columns = min(8, len(heads))
    rows = -(-len(heads) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(9, 9 / columns * rows * 1.16), squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for (layer, head), axes in zip(heads, panels.flat):
        axes.axis("on")
        axes.imshow(np.sqrt(maps[layer][head]), cmap="GnBu", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        pruned = head in gone[layer]
        axes.spines[:].set(visible=True, color=FOURTH if pruned else LINE, linewidth=2 if pruned else 0.8)
        axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=7, fontweight="normal", loc="left", pad=3)
        axes.set_xlabel(f"importance {importance[layer][head]:.2f}" + (", pruned" if pruned else ""), fontsize=6.5,
                        color=FOURTH if pruned else SOFT, labelpad=2)
    return figure


@styled
def shrinking(run):
    """What pruning and quantizing cost in bits a byte, against the bytes that are left."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 2.7), width_ratios=(1, 1.35))
    prune = run.results["prune"]
    names = ["all heads", "without the least\nimportant", *[f"random {i + 1}" for i in range(len(prune["random"]))]]
    values = [prune["before"]["loss"], prune["after"]["loss"], *[draw["loss"] for draw in prune["random"]]]
    colours = [EXPERTS, THIRD, *[LINE] * len(prune["random"])]
    left.barh(range(len(values)), values, color=colours, height=0.62)
    for i, value in enumerate(values):
        left.annotate(f"{value:.3f}", (value, i), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
                      color=INK)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    spread = max(values) - min(values)
    left.set_xlim(min(values) - max(spread, 0.02), max(values) + max(spread, 0.02))
    left.grid(axis="y", visible=False)
    left.set_title("Held-out loss without a fifth of the heads")
    left.set_xlabel("nats a token (the axis does not begin at 0)")

    models = [{"name": "pruned", "label": "32 bits", "bytes": prune["bytes"], **prune["after"]},
              *run.results["quantize"]["models"]]
    colours = [EXPERTS, THIRD, DENSE, FOURTH]
    for model, colour in zip(models, colours):
        right.plot(model["bytes"] / 1e6, model["loss"], marker="o", markersize=8, color=colour, linestyle="none")
        right.annotate(model["label"], (model["bytes"] / 1e6, model["loss"]), xytext=(8, 0), fontsize=8,
                       textcoords="offset points", color=colour, va="center")
    right.set_xlim(0, models[0]["bytes"] / 1e6 * 1.15)
    right.margins(y=0.25)
    right.set_xlabel("MB on disk")
    right.set_title("Held-out loss against size")
    return figure
