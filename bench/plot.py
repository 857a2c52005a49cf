"""The figure of latencies: a panel per network and batch, a group of bars per form, a bar per graph.

The tick across a group stands where the original's time would be if it fell as the MACs did. No
background and middle tones, so that it can be read on white and on black. The rows' digest is in
the file's metadata: `table.py --check` compares it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from table import Row, digest, forms_of, ratio

INK, FAINT, TICK = "#7d8590", "#7d859055", "#d9822b"
COLOURS = ("#9aa4b0", "#4c8dff", "#1f9e8f")  # original, pruned, pruned+folded
STYLE = {
    "svg.hashsalt": "fxprune", "font.size": 8.5, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK, "axes.titlecolor": INK,
}  # fmt: skip


def panel(ax: Axes, rows: Sequence[Row], graphs: Sequence[str], forms: Sequence[str]) -> None:
    """One network at one batch size."""
    value = {(row["bench"], row["provider"]): float(row["p50"]) for row in rows}
    left = min(value["macs", graph] for graph in graphs) / value["macs", graphs[0]]
    height = 0.8 / len(graphs)
    longest = max(ms for (bench, _), ms in value.items() if bench != "macs")
    for place, form in enumerate(forms):
        first = value.get((form, graphs[0]))
        for i, (graph, colour) in enumerate(zip(graphs, COLOURS, strict=True)):
            ms = value.get((form, graph))
            if ms is None:
                continue
            y = place + (i - (len(graphs) - 1) / 2) * height
            ax.barh(y, ms, 0.86 * height, color=colour)
            if first and graph != graphs[0]:
                # Clear of the tick, which may stand just behind the bar's end.
                end = first * left if ms < first * left < ms + 0.2 * longest else ms
                ax.text(end + 0.02 * longest, y, ratio(ms, first), va="center", fontsize=7)
        if first:
            ends = [place - 0.46, place + 0.46]
            ax.plot([first * left] * 2, ends, color=TICK, linewidth=1.6, solid_capstyle="butt")
    ax.set_yticks(range(len(forms)), forms)
    ax.set_ylim(len(forms) - 0.45, -0.55)
    ax.set_xlim(0, 1.15 * longest)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.tick_params(length=0)
    ax.xaxis.grid(True, color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right", "bottom"):
        ax.spines[side].set_visible(False)


def draw(rows: Sequence[Row], path: Path) -> None:
    """The figure of one machine's rows, as SVG."""
    graphs = list(dict.fromkeys(row["provider"] for row in rows))
    forms = forms_of(rows)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    batches = sorted({int(row["shape"].partition("x")[0]) for row in rows})
    with rc_context(STYLE):
        size = (0.9 + 2.35 * len(cases), 0.9 + (0.5 + 0.42 * len(forms)) * len(batches))
        figure = Figure(size, layout="constrained")
        figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
        axes = figure.subplots(len(batches), len(cases), squeeze=False, sharey=True)
        for i, batch in enumerate(batches):
            for j, case in enumerate(cases):
                mine = [r for r in rows if r["case"] == case and r["shape"].startswith(f"{batch}x")]
                if not any(row["bench"] != "macs" for row in mine):
                    axes[i, j].axis("off")
                    continue
                panel(axes[i, j], mine, graphs, forms)
                axes[i, j].set_title(f"{case}, batch {batch}", fontsize=9, loc="left")
        for ax in axes[-1]:
            ax.set_xlabel("ms")
        keys: list[Patch | Line2D] = [Patch(color=c, label=g) for g, c in zip(graphs, COLOURS, strict=True)]  # fmt: skip
        keys.append(
            Line2D([], [], color=TICK, linewidth=1.6, label="original × share of MACs left")
        )
        figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), frameon=False)
        about = {"Date": None, "Creator": None, "Description": f"rows {digest(rows)}"}
        figure.savefig(path, format="svg", transparent=True, metadata=about)
