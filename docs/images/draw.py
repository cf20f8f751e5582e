"""Draw the README's three figures from the study's rows: `python docs/images/draw.py`."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from minilora.report.plots import plot_against_rank, plot_deployed, plot_memory
from minilora.sweep.results import load_results

HERE = Path(__file__).parent
STUDY = HERE.parent.parent / "benchmarks" / "results" / "study"


def main() -> None:
    """Write rank.png, deployed.png and memory.png beside this file."""
    rows = [row for row in load_results(STUDY) if row["stage"] != "search"]
    by_rank = [row for row in rows if row["bits"] in (4, 32)]
    for name, height, draw in (
        ("rank", 3.6, lambda ax: plot_against_rank(by_rank, ax, metric="recall", task="products")),
        ("deployed", 3.6, lambda ax: plot_deployed(rows, ax, metric="recall", task="products")),
        ("memory", 4.4, lambda ax: plot_memory(rows, ax, against="bits", task="products")),
    ):
        figure = Figure(figsize=(8, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(HERE / f"{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
