"""Values to pages: attention maps and study reports as single HTML files that need no network.

plotly.js stands inside each page, packed; MLflow's UI shows such pages in a sandboxed frame that can load nothing.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from lm.attention import AttentionMap

_HERE = Path(__file__).parent
PACKING_ERROR = 0.5 / 255
"""Largest difference between a weight and its packed value on the page."""


def attention_page(maps: Mapping[int, AttentionMap], title: str) -> str:
    """A page of attention heatmaps.

    Args:
        maps: epoch to the map of the same text; layers, heads and tokens are equal in all.
        title: the page's heading.

    Returns:
        HTML with a small map for each head, one head large with its tokens, and an epoch slider if there are several.
    """
    epochs = sorted(maps)
    weights = np.stack([maps[e].weights_LHTS for e in epochs])
    packed = np.rint(weights * 255).astype(np.uint8)
    data = {
        "title": title,
        "tokens": maps[epochs[0]].tokens,
        "epochs": epochs,
        "shape": list(packed.shape[:4]),
        "weights": _pack(packed.tobytes()),
    }
    return _page(title, _read("attention_page.html"), _read("attention_page.js"), data)


def report_page(title: str, about: str, figures: Sequence[tuple[str, str, go.Figure]], table: str = "") -> str:
    """A page of figures under each other.

    Args:
        title: heading of the page.
        about: one paragraph under it, plain text.
        figures: heading, one line that says how to read it, and the figure.
        table: HTML put before the figures.
    """
    body = [f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>{table}"]
    for i, (heading, how, _) in enumerate(figures):
        body.append(f'<h2>{html.escape(heading)}</h2><p>{html.escape(how)}</p><div id="figure{i}"></div>')
    script = """
async function start() {
  for (const [i, figure] of payload.figures.entries())
    await Plotly.newPlot(`figure${i}`, figure.data, {...figure.layout, ...look, template: undefined, title: undefined,
      margin: {t: 20}}, {displaylogo: false, responsive: true});
  document.body.dataset.view = "drawn";
}"""
    return _page(title, "\n".join(body), script, {"figures": [json.loads(f.to_json() or "{}") for _, _, f in figures]})


def add_level(figure: go.Figure, value: float, label: str, ends: tuple[float, float]) -> None:
    """Draw a dashed level from one x to another; Plotly's own level lines misplace their labels on logarithmic axes."""
    line = {"dash": "dash", "width": 1.5}
    figure.add_scatter(x=list(ends), y=[value, value], mode="lines", line=line, name=label)


def html_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain table, every cell escaped; columns of words stand to the left, of numbers to the right."""
    words = [any(str(row[i])[:1].isalpha() for row in rows) for i in range(len(header))]

    def line(tag: str, cells: Sequence[object]) -> str:
        parts = (
            f"<{tag}{' class=words' if is_words else ''}>{html.escape(str(cell))}</{tag}>"
            for cell, is_words in zip(cells, words, strict=True)
        )
        return f"<tr>{''.join(parts)}</tr>"

    return f"<table>{line('th', header)}{''.join(line('td', row) for row in rows)}</table>"


def _page(title: str, body: str, script: str, data: Mapping[str, Any]) -> str:
    # "</" would end the script element that holds the data, whatever stands around it.
    text = json.dumps(data).replace("</", "<\\/").replace("<!--", "<\\u0021--")
    page = _read("page.html")
    for place, content in (
        ("__TITLE__", html.escape(title)),
        ("__BODY__", body),
        ("__SCRIPT__", script),
        ("__PLOTLY__", _plotly_packed()),
        ("__DATA__", text),
    ):
        page = page.replace(place, content, 1)
    return page


@cache
def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


@cache
def _plotly_packed() -> str:
    from plotly.offline import get_plotlyjs

    return _pack(get_plotlyjs().encode())


def _pack(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode("ascii")
