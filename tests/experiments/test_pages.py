"""The pages, looked at in a real browser without a network."""

import json
import time
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from playwright.sync_api import Page

from experiments import plots
from tests.browser import open_browser, screenshot
from tests.experiments.test_plots import HTML_LIKE, history

pytestmark = pytest.mark.browser


def view(page: Page) -> dict[str, Any]:
    return json.loads(page.evaluate("document.body.dataset.view"))


def shown(page: Page, query: int, key: int, run: int = 0) -> float:
    return page.evaluate(f"document.getElementById('head{run}').data[0].customdata[{query}][{key}]")


def test_the_attention_page_can_be_worked_by_mouse_and_keys(tmp_path: Path) -> None:
    made = history(epochs=3, layers=4, heads=8, n=32, texts=2)
    weights = made.weights["validation 1"].astype(float)
    file = tmp_path / "attention.html"
    file.write_text(plots.attention_page([made], "three epochs"), "utf-8")
    with open_browser() as (page, errors):
        started = time.perf_counter()
        page.goto(file.as_uri())
        page.wait_for_selector("#head0 .heatmaplayer image")
        assert time.perf_counter() - started < 3 * 3  # 3 s on an idle machine

        assert {"epoch": 2, "layer": 0, "head": 0, "show": "weights", "scale": "linear"}.items() <= view(page).items()
        assert page.locator("#grid button").count() == 32
        page.locator("#grid button[data-layer='2'][data-head='5']").click()
        assert (view(page)["layer"], view(page)["head"]) == (2, 5)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        assert (view(page)["layer"], view(page)["head"]) == (3, 6)
        page.locator("#epoch").fill("0")
        page.locator("#scale").select_option("log")
        assert (view(page)["epoch"], view(page)["scale"]) == (0, "log")
        assert "epoch 0, layer 4, head 7" in page.locator("#head0").inner_text()
        labels = page.locator("#head0 .xtick text").all_text_contents()
        assert labels[:4] == HTML_LIKE
        assert shown(page, 31, 20) == pytest.approx(weights[0, 3, 6, 31, 20])
        assert page.evaluate("document.getElementById('head0').data[0].z[3][4]") is None
        screenshot(page, "attention-file")

        page.locator("h1").click()  # keys belong to a list while it has the focus
        page.keyboard.press(".")
        page.keyboard.press("d")
        assert (view(page)["epoch"], view(page)["show"]) == (1, "previous")
        assert shown(page, 31, 20) == pytest.approx(weights[1, 3, 6, 31, 20] - weights[0, 3, 6, 31, 20])
        page.keyboard.press("a")
        page.locator("#show").select_option("epoch 2")
        difference = (weights[1, 3] - weights[2, 3]).mean(0)
        assert shown(page, 9, 4) == pytest.approx(difference[9, 4], abs=1e-6)
        assert "average over heads, minus epoch 2" in page.locator("#head0").inner_text()
        page.locator("#text").select_option("1")
        page.locator("#show").select_option("weights")
        assert shown(page, 9, 4) == pytest.approx(made.weights["validation 2"][1, 3].astype(float).mean(0)[9, 4])
        page.locator("#measure").select_option("distance")
        assert page.evaluate("document.getElementById('curves').data.at(-1).y[2]") == pytest.approx(
            made.measures["distance"][2].mean(), abs=1e-3
        )
        page.locator("#theme").select_option("dark")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        page.locator("#play").click()
        page.wait_for_function("JSON.parse(document.body.dataset.view).epoch === 0")  # 2 comes first
        page.locator("#play").click()
        link = page.url
        page.goto("about:blank")
        page.goto(link)
        page.wait_for_selector("#head0 .heatmaplayer image")
        assert {"text": 1, "head": -1, "layer": 3, "measure": "distance", "theme": "dark"}.items() <= view(page).items()
        assert errors == []


def test_two_runs_stand_side_by_side_and_their_difference_is_shown(tmp_path: Path) -> None:
    a, b = history(n=32, run="<b>a</b>"), history(n=32, run="b", seed=1)
    file = tmp_path / "two.html"
    file.write_text(plots.attention_page([a, b], "two runs", above="<p>differences</p>"), "utf-8")
    with open_browser() as (page, errors):
        page.goto(file.as_uri() + "#show=runs&run=1&layer=1&head=2&epoch=nonsense")
        page.wait_for_selector("#head1 .heatmaplayer image")
        first, second = (h.weights["validation 1"][1, 1, 2].astype(float) for h in (a, b))
        assert shown(page, 30, 3) == pytest.approx(first[30, 3])
        assert shown(page, 30, 3, run=1) == pytest.approx(second[30, 3] - first[30, 3], abs=1e-6)
        assert "<b>a</b>" in page.locator("#head0").inner_text()
        screenshot(page, "attention-compare")
        assert errors == []


def test_a_long_text_is_drawn_in_time(tmp_path: Path) -> None:
    made = history(epochs=4, layers=4, heads=8, n=256, texts=2)
    file = tmp_path / "long.html"
    file.write_text(plots.attention_page([made], "256 tokens"), "utf-8")
    assert file.stat().st_size < 12_000_000
    with open_browser() as (page, errors):
        started = time.perf_counter()
        page.goto(file.as_uri())
        page.wait_for_selector("#head0 .heatmaplayer image")
        assert time.perf_counter() - started < 3 * 3
        assert "To keep the page small it shows one of 2 texts." in page.locator("#notes").inner_text()
        screenshot(page, "attention-256")
        assert errors == []


def test_a_page_of_one_epoch_has_no_slider(tmp_path: Path) -> None:
    file = tmp_path / "one.html"
    file.write_text(plots.attention_page([history(epochs=1)], "one epoch"), "utf-8")
    with open_browser() as (page, errors):
        page.goto(file.as_uri())
        page.wait_for_selector("#head0 .heatmaplayer image")
        assert not page.locator("#epoch").is_visible()
        assert "epoch 0" in page.locator("#head0").inner_text()
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
