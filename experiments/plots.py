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

from lm.attention import triangle
from lm.errors import UserError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from experiments.captures import History

_HERE = Path(__file__).parent
LARGEST_MAPS = 8_000_000
"""Bytes of weights from which on a page leaves things out."""


def attention_page(histories: Sequence[History], title: str, above: str = "", largest: int = LARGEST_MAPS) -> str:
    """A page of attention maps that a browser can work: one run over its epochs, or several side by side.

    What the page would be too large with is left out, and the page says how much: all texts but one (the first of a
    person's own, if there is one), then epochs between the first and the last, then the heads that spread their
    attention most. Of several runs the epochs, texts, layers and heads that all of them have are shown.

    Args:
        histories: of the runs, the first being the one that others are compared with.
        title: the page's heading.
        above: HTML between heading and maps.
        largest: bytes of weights from which on things are left out.

    Raises:
        UserError: the runs have no text or no epoch in common.
    """
    shown, left_out = _choose(histories, largest)
    texts, epochs, n_layers, heads = shown
    runs: list[dict[str, Any]] = []
    for history in histories:
        at = [history.epochs.index(epoch) for epoch in epochs]
        rows = (history.weights[text][at][:, :n_layers, heads] for text in texts)
        packed = b"".join(triangle(weights).tobytes() for weights in rows)
        measures = {
            name: [[[_figure(x) for x in layer] for layer in epoch] for epoch in values]
            for name, values in history.measures.items()
        }
        runs.append(
            {
                "name": history.run,
                "verdict": history.verdict(),
                "weights": _pack(packed),
                "measured": history.epochs,
                "measures": measures,
            }
        )
    data = {
        "title": title,
        "texts": [{"name": text, "tokens": histories[0].tokens[text]} for text in texts],
        "epochs": epochs,
        "layers": n_layers,
        "heads": heads,
        "notes": left_out,
        "runs": runs,
    }
    return _page(title, _read("attention_page.html").replace("__ABOVE__", above), _read("attention_page.js"), data)


def _figure(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None


def _choose(
    histories: Sequence[History], largest: int
) -> tuple[tuple[list[str], list[int], int, list[int]], list[str]]:
    """Texts, epochs, number of layers and heads of a page, and in sentences what was left out."""
    first, left_out = histories[0], list[str]()
    texts = [text for text in first.tokens if all(h.tokens.get(text) == first.tokens[text] for h in histories)]
    epochs = [epoch for epoch in first.epochs if all(epoch in h.epochs for h in histories)]
    if not texts or not epochs:
        raise UserError(
            "attention can be compared on equal tokens at equal epochs: "
            f"got none in common of {', '.join(h.run for h in histories)}. "
            "Try runs with the same corpus, vocabulary and --seq-len."
        )
    shapes = [next(iter(h.weights.values())).shape[1:3] for h in histories]
    n_layers, n_heads = (min(shape[i] for shape in shapes) for i in (0, 1))
    if len(set(shapes)) > 1:
        sizes = ", ".join(f"{h.run} {L} x {H}" for h, (L, H) in zip(histories, shapes, strict=True))
        left_out.append(f"Layers x heads: {sizes}; shown are the first {n_layers} layers and {n_heads} heads of each.")
    heads = list(range(n_heads))

    def size() -> int:
        tokens = [len(first.tokens[text]) for text in texts]
        return sum(n * (n + 1) for n in tokens) * len(epochs) * n_layers * len(heads) * len(histories)

    if size() > largest and len(texts) > 1:
        left_out.append(f"To keep the page small it shows one of {len(texts)} texts.")
        own = [text for text in texts if not text.startswith("validation")]
        texts = (own or texts)[:1]
    if size() > largest and len(epochs) > 2:
        kept = max(2, largest * len(epochs) // size())
        places = np.unique(np.linspace(0, len(epochs) - 1, kept).round().astype(int))
        left_out.append(f"To keep the page small it shows {len(places)} of {len(epochs)} epochs.")
        epochs = [epochs[i] for i in places]
    if size() > largest:
        kept = max(1, largest * len(heads) // size())
        spread_H = first.measures["entropy"][-1, :n_layers, :n_heads].mean(0) if first.measures else np.arange(n_heads)
        heads = sorted(int(h) for h in np.argsort(spread_H)[:kept])
        numbers = ", ".join(str(h + 1) for h in heads)
        left_out.append(
            f"To keep the page small it shows {kept} of {n_heads} heads a layer, those of least entropy: {numbers}."
        )
    return (texts, epochs, n_layers, heads), left_out


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
