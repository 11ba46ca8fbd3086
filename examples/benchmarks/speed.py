"""Bars of speed by dimension, from the tables that ``inverse.py`` and ``density.py`` printed; measures nothing.

    python examples/benchmarks/speed.py               # those of docs/benchmarks.md; leaves speed.png in out/
    python examples/benchmarks/speed.py --tables FILE # a file with the output of both scripts

A bar says how many times as long another library takes as this package, on one layer of a MAF with batches of 100:
the median over rounds.
"""

from pathlib import Path

from _runs import EXAMPLES, command
from _script import FLOW, OTHER, STYLE, THIRD, TRUTH, save
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

PAGE = EXAMPLES.parent / "docs" / "benchmarks.md"
COLORS = {"pyro": OTHER, "zuko": THIRD, "nflows": TRUTH, "normflows": "#f2a541"}
Ratios = dict[int, dict[str, float]]


def ratios(text: str, mark: str, call: str = "", batch: int = 100) -> Ratios:
    """By dimension and library, the ratios of a table of one layer whose header has the mark."""
    found: Ratios = {}
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif cells[0] == "D, H, layers, batch":
            header = cells if mark in cells else []
        elif header and not set(line) <= set("|-: "):
            dim, _, layers, rows = (int(number) for number in cells[0].split(","))
            if layers == 1 and rows == batch and (not call or cells[header.index("call")] == call):
                peers = [
                    (name.split()[0], cell) for name, cell in zip(header, cells, strict=True) if name[:4] != "ours"
                ]
                found[dim] = {name: float(cell.split()[0]) for name, cell in peers if name in COLORS and cell != "-"}
    if not found:
        raise ValueError(f"expected a table with a column {mark!r} and batches of {batch}, got none")
    return found


def bars(ax: Axes, table: Ratios, title: str) -> None:
    names = [name for name in COLORS if any(name in row for row in table.values())]
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        places = [(j + width * (k + 0.5) - 0.4, row[name]) for j, row in enumerate(table.values()) if name in row]
        x, height = zip(*places, strict=True)
        ax.bar(x, [value - 1 for value in height], width, bottom=1, color=COLORS[name], label=name)
    for j, row in enumerate(table.values()):
        name, top = max(row.items(), key=lambda pair: pair[1])
        place = j + width * (names.index(name) + 0.5) - 0.4
        ax.text(place, 1.04 * top, f"{top:.3g}", ha="center", fontsize=10)
    ax.axhline(1, color=FLOW, linewidth=2, label="this package")
    ax.set_xticks(range(len(table)), [str(dim) for dim in table])
    ax.set(yscale="log", xlabel="dimensions", title=title)
    ax.minorticks_off()


def main() -> None:
    args = command(
        __doc__,
        "the same",
        picture=True,
        tables={"type": Path, "default": PAGE, "help": "what the two scripts printed"},
    )
    plt.rcParams.update(STYLE)
    text = args.tables.read_text()
    tables = {
        "drawing samples": ratios(text, "ours / dense pass"),
        "log_prob": ratios(text, "call", "log_prob"),
        "training step": ratios(text, "call", "train"),
    }
    for name, table in tables.items():
        for dim, row in table.items():
            print(f"{name}, D = {dim}: " + ", ".join(f"{peer} {value:g}" for peer, value in row.items()))
    fig, axes = plt.subplots(1, 3, figsize=(9.2, 3.9), layout="constrained", width_ratios=(1.7, 1, 1))
    for ax, (name, table) in zip(axes, tables.items(), strict=True):
        bars(ax, table, name)
    for ax in axes[1:]:
        ax.set_ylim(0.8, 3)
        ax.set_yticks([1, 2, 3], ["1", "2", "3"])
    axes[0].set_ylim(0.7, 700)
    axes[0].set_yticks([1, 10, 100], ["1", "10", "100"])
    axes[0].set_ylabel("times as long as this package")
    axes[0].legend(loc="upper left")
    save(fig, args.out / "speed.png", 64)


if __name__ == "__main__":
    main()
