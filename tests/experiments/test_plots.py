import base64
import gzip
import json
import re

import numpy as np
import plotly.graph_objects as go

from experiments import plots
from lm.attention import AttentionMap


def causal_map(n: int = 8, layers: int = 2, heads: int = 3, seed: int = 0) -> AttentionMap:
    weights = np.tril(np.random.default_rng(seed).random((layers, heads, n, n)))
    tokens = ["<script>alert(1)</script>", "</script>", "<!--", "&amp;", *[f"t{i}" for i in range(n - 4)]]
    return AttentionMap(tokens, (weights / weights.sum(-1, keepdims=True)).astype(np.float32))


def payload(page: str) -> dict[str, object]:
    found = re.search(r'<script id="payload" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def test_packed_weights_are_the_maps_own_to_within_the_stated_error() -> None:
    maps = {1: causal_map(seed=1), 2: causal_map(seed=2)}
    data = payload(plots.attention_page(maps, "two epochs"))
    raw = gzip.decompress(base64.b64decode(str(data["weights"])))
    unpacked = np.frombuffer(raw, np.uint8).reshape(data["shape"] + [8]) / 255  # type: ignore[operator]
    for i, epoch in enumerate((1, 2)):
        assert np.abs(unpacked[i] - maps[epoch].weights_LHTS).max() <= plots.PACKING_ERROR
    assert not np.triu(unpacked, 1).any()
    assert data["epochs"] == [1, 2]


def test_tokens_that_look_like_html_stay_data() -> None:
    page = plots.attention_page({1: causal_map()}, "<b>title</b>")
    assert payload(page)["tokens"][:2] == ["<script>alert(1)</script>", "</script>"]  # type: ignore[index]
    assert "alert(1)</script>" not in page
    assert "<title>&lt;b&gt;title&lt;/b&gt;</title>" in page


def test_a_page_needs_no_network_and_is_small() -> None:
    page = plots.attention_page({e: causal_map(32, 4, 8, e) for e in range(10)}, "reference size")
    assert not re.findall(r'(?:src|href)="?https?:', page)
    assert len(page) < 3_000_000


def test_a_report_holds_its_figures_and_escapes_its_table() -> None:
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4]))
    table = plots.html_table(["a"], [["<i>"]])
    page = plots.report_page("study", "about", [("heading", "how to read", figure)], table)
    assert payload(page)["figures"][0]["data"][0]["y"] == [3, 4]  # type: ignore[index]
    assert "<td>&lt;i&gt;</td>" in page
    assert 'id="figure0"' in page
