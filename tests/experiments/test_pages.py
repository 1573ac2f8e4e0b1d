"""The pages, looked at in a real browser without a network."""

import json
import time
from pathlib import Path

import plotly.graph_objects as go
import pytest

from experiments import plots
from tests.browser import open_browser, screenshot
from tests.experiments.test_plots import causal_map

pytestmark = pytest.mark.browser


def test_the_attention_page_can_be_worked_by_mouse_and_keys(tmp_path: Path) -> None:
    file = tmp_path / "attention.html"
    file.write_text(plots.attention_page({e: causal_map(32, 4, 8, e) for e in (1, 2, 3)}, "three epochs"), "utf-8")
    with open_browser() as (page, errors):
        started = time.perf_counter()
        page.goto(file.as_uri())
        page.wait_for_selector("#head .heatmaplayer image")
        assert time.perf_counter() - started < 3 * 3  # 3 s on an idle machine

        def view() -> dict[str, object]:
            return json.loads(page.evaluate("document.body.dataset.view"))

        assert view() == {"epoch": 2, "layer": 0, "head": 0, "scale": "linear"}
        assert page.locator("#grid button").count() == 32
        page.locator("#grid button[data-layer='2'][data-head='5']").click()
        assert (view()["layer"], view()["head"]) == (2, 5)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        assert (view()["layer"], view()["head"]) == (3, 6)
        page.locator("#epoch").fill("0")
        page.locator("#scale").select_option("log")
        assert (view()["epoch"], view()["scale"]) == (0, "log")
        assert "epoch 1, layer 4, head 7" in page.locator("#head").inner_text()
        labels = page.locator("#head .xtick text").all_text_contents()
        assert labels[0] == "<script>alert(1)</script>"
        shown = page.evaluate("document.getElementById('head').data[0].customdata[31][31]")
        assert abs(shown - causal_map(32, 4, 8, 1).weights_LHTS[3, 6, 31, 31]) <= plots.PACKING_ERROR
        screenshot(page, "attention-file")
        assert errors == []


def test_a_page_of_one_epoch_has_no_slider(tmp_path: Path) -> None:
    file = tmp_path / "one.html"
    file.write_text(plots.attention_page({7: causal_map()}, "one epoch"), "utf-8")
    with open_browser() as (page, errors):
        page.goto(file.as_uri())
        page.wait_for_selector("#head .heatmaplayer image")
        assert not page.locator("#epoch").is_visible()
        assert "epoch 7" in page.locator("#head").inner_text()
        assert errors == []


def test_a_report_draws_every_figure(tmp_path: Path) -> None:
    figures = [(f"figure {i}", "how to read", go.Figure(go.Scatter(x=[1, 2], y=[3, i]))) for i in range(3)]
    file = tmp_path / "report.html"
    file.write_text(plots.report_page("study", "about", figures, plots.html_table(["a"], [["1"]])), "utf-8")
    with open_browser() as (page, errors):
        page.goto(file.as_uri())
        page.wait_for_selector("body[data-view='drawn']")
        assert page.locator(".scatterlayer").count() == 3
        assert errors == []
