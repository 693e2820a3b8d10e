"""The flow chart of layout.md as an SVG, drawn while the site is built, so that no script is fetched to show it.

Of Mermaid's language it reads what the page uses: ``name["title<br/>text"]`` and ``tail --> head & head``.
"""

from __future__ import annotations

import hashlib
import re
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

WIDTH, HEIGHT = 2.6, 1.15  # of the place of one box, in inches


def parsed(text: str) -> tuple[dict[str, tuple[str, str]], list[tuple[str, str]]]:
    """Title and text by name, and the arrows."""
    boxes = {name: (title, rest) for name, title, rest in re.findall(r'(\w+)\["(.*?)<br/>(.*?)"\]', text)}
    lines = re.findall(r"(\w+) --> (.*)", text)
    return boxes, [(tail, head) for tail, heads in lines for head in heads.split(" & ")]


def layers(boxes: Any, arrows: list[tuple[str, str]]) -> list[list[str]]:
    """Rows of names; every arrow leads downwards."""
    above: dict[str, set[str]] = {name: set() for name in boxes}
    for tail, head in arrows:
        above[head].add(tail)
    depth: dict[str, int] = {}
    for name in TopologicalSorter(above).static_order():
        depth[name] = 1 + max((depth[a] for a in above[name]), default=-1)
    return [[name for name in boxes if depth[name] == level] for level in range(max(depth.values()) + 1)]


def draw(text: str, path: Path) -> None:
    """The chart as an SVG."""
    boxes, arrows = parsed(text)
    rows = layers(boxes, arrows)
    columns = max(map(len, rows))
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * len(rows)), dpi=72)  # that of an SVG
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(len(rows), 0))
    axis.axis("off")
    at = {
        name: ((columns - len(row)) / 2 + i + 0.5, level + 0.5)
        for level, row in enumerate(rows)
        for i, name in enumerate(row)
    }
    patches = {}
    for name, (title, rest) in boxes.items():
        words = rest.replace(", ", ",\n", 1) if len(rest) > 30 else rest
        box = {"boxstyle": "round,pad=0.45", "facecolor": "white", "edgecolor": "0.35"}
        written = axis.text(
            *at[name], f"{title}\n{words}", ha="center", va="center", fontsize=9, linespacing=1.3, bbox=box
        )
        patches[name] = written.get_bbox_patch()
    for tail, head in arrows:  # from edge to edge, behind the other boxes
        style = {
            "arrowstyle": "-|>",
            "color": "0.55",
            "linewidth": 0.9,
            "patchA": patches[tail],
            "patchB": patches[head],
        }
        axis.annotate("", at[head], at[tail], arrowprops=style, zorder=0.5)
    figure.draw_without_rendering()  # boxes get their places, at which the arrows begin and end
    figure.savefig(path, dpi=72)


def setup(app: Any) -> dict[str, bool]:
    from docutils import nodes
    from docutils.parsers.rst import Directive

    class Chart(Directive):
        """A ``mermaid`` block."""

        has_content = True

        def run(self) -> list[nodes.Node]:
            text = "\n".join(self.content)
            name = f"chart-{hashlib.sha1(text.encode()).hexdigest()[:10]}.svg"
            folder = Path(app.srcdir) / "auto_charts"
            folder.mkdir(exist_ok=True)
            draw(text, folder / name)
            return [nodes.image(uri=f"/auto_charts/{name}", alt="Rooms of the package, and which imports which")]

    app.add_directive("mermaid", Chart)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
