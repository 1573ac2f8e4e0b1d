import base64
import gzip
import json
import re
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from experiments import captures, plots
from experiments.captures import Capture, History
from lm import attention
from lm.attention import AttentionMap
from lm.errors import UserError

HTML_LIKE = ["<script>alert(1)</script>", "</script>", "<!--", "&amp;"]


def history(
    epochs: int = 2, layers: int = 2, heads: int = 3, n: int = 8, run: str = "made", texts: int = 1, seed: int = 0
) -> History:
    """Random maps of texts of `n` tokens, the first of them like HTML."""
    random = np.random.default_rng(seed)
    taken: list[Capture] = []
    for epoch in range(epochs):
        maps: dict[str, AttentionMap] = {}
        for i in range(texts):
            weights = np.tril(random.random((layers, heads, n, n)))
            tokens = [*HTML_LIKE, *[f"t{i}" for i in range(n - 4)]]
            maps[f"validation {i + 1}"] = AttentionMap(
                tokens, (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
            )
        taken.append(captures.take(epoch, maps, list(maps), taken[-1] if taken else None, {}))
    return captures.join(run, taken)


def unpacked(data: dict[str, Any], run: int = 0) -> list[np.ndarray]:
    """The triangles [E, L, H, tri] of each text on a page."""
    raw = np.frombuffer(gzip.decompress(base64.b64decode(data["runs"][run]["weights"])), np.float16)
    found: list[np.ndarray] = []
    for text in data["texts"]:
        n = len(text["tokens"])
        shape = (len(data["epochs"]), data["layers"], len(data["heads"]), n * (n + 1) // 2)
        found.append(raw[: np.prod(shape)].reshape(shape))
        raw = raw[np.prod(shape) :]
    assert not len(raw)
    return found


def payload(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="payload" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def test_a_page_holds_the_weights_that_are_stored() -> None:
    made = history(texts=2)
    data = payload(plots.attention_page([made], "two epochs"))
    for found, name in zip(unpacked(data), made.tokens, strict=True):
        np.testing.assert_array_equal(found, attention.triangle(made.weights[name]))
    assert (data["epochs"], data["notes"]) == ([0, 1], [])
    np.testing.assert_allclose(data["runs"][0]["measures"]["entropy"], made.measures["entropy"], atol=1e-4)
    assert data["runs"][0]["measures"]["change"][0][0][0] is None


def test_tokens_that_look_like_html_stay_data() -> None:
    page = plots.attention_page([history()], "<b>title</b>")
    assert payload(page)["texts"][0]["tokens"][:4] == HTML_LIKE
    assert "alert(1)</script>" not in page
    assert "<title>&lt;b&gt;title&lt;/b&gt;</title>" in page


def test_a_page_needs_no_network_and_is_small() -> None:
    page = plots.attention_page([history(epochs=11, layers=4, heads=8, n=32, texts=2)], "reference size")
    assert not re.findall(r'(?:src|href)="?https?:', page)
    assert len(page) < 3_000_000


@pytest.mark.parametrize(
    ("limit", "texts", "epochs", "heads"),
    [(10**6, 2, 6, 3), (3 * 10**3, 1, 6, 3), (1500, 1, 3, 3), (800, 1, 2, 2), (1, 1, 2, 1)],
)
def test_a_page_that_would_be_too_large_says_what_it_leaves_out(
    limit: int, texts: int, epochs: int, heads: int
) -> None:
    made = history(epochs=6, texts=2)
    data = payload(plots.attention_page([made], "cut", largest=limit))
    assert (len(data["texts"]), len(data["epochs"]), len(data["heads"])) == (texts, epochs, heads)
    assert {data["epochs"][0], data["epochs"][-1]} == {0, 5}
    assert len(data["notes"]) == (texts < 2) + (epochs < 6) + (heads < 3)
    at = np.ix_(data["epochs"], range(2), data["heads"])
    np.testing.assert_array_equal(unpacked(data)[0], attention.triangle(made.weights["validation 1"][at]))
    least = made.measures["entropy"][-1].mean(0)
    assert max(least[data["heads"]]) == sorted(least)[heads - 1]
    np.testing.assert_allclose(data["runs"][0]["measures"]["entropy"], made.measures["entropy"], atol=1e-4)


def test_a_page_of_one_epoch_has_no_verdict() -> None:
    assert payload(plots.attention_page([history(epochs=1)], "one"))["runs"][0]["verdict"] == ""
    assert "settled" in payload(plots.attention_page([history()], "two"))["runs"][0]["verdict"]


def test_runs_of_two_shapes_are_shown_as_far_as_both_go() -> None:
    small, large = history(run="small"), history(run="large", epochs=4, layers=3, heads=2, seed=1)
    data = payload(plots.attention_page([small, large], "two"))
    assert (data["layers"], data["heads"], data["epochs"]) == (2, [0, 1], [0, 1])
    assert "small 2 x 3, large 3 x 2" in data["notes"][0]
    np.testing.assert_array_equal(unpacked(data, 1)[0], attention.triangle(large.weights["validation 1"][:2, :2, :2]))
    with pytest.raises(
        UserError, match="attention can be compared on equal tokens.*got none in common of small, other"
    ):
        plots.attention_page([small, history(run="other", n=9)], "two")


def test_a_report_holds_its_figures_and_escapes_its_table() -> None:
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4]))
    table = plots.html_table(["a"], [["<i>"]])
    page = plots.report_page("study", "about", [("heading", "how to read", figure)], table)
    assert payload(page)["figures"][0]["data"][0]["y"] == [3, 4]
    assert "<td>&lt;i&gt;</td>" in page
    assert 'id="figure0"' in page
