"""The MLflow UI as `ui.py` opens it, in a real browser: the charts, and an attention page inside it."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator
from pathlib import Path

import pytest

from experiments import tune
from experiments.settings import Settings
from experiments.tracking import Tracker
from tests.browser import open_browser, screenshot
from tests.conftest import TOY_FLAGS, free_port

pytestmark = [pytest.mark.browser, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def ui(lab: Path, toy_csv: Path) -> Generator[tuple[str, Tracker, str]]:
    """Address of a running UI on a small study, the tracker, and what ui.py printed."""
    tune.main([*TOY_FLAGS, "--corpus", str(toy_csv), "--trials", "4", "--n-layers", "2", "--lr", "0.003"])
    port = free_port()
    command = [sys.executable, str(ROOT / "experiments/ui.py"), "--port", str(port)]
    log = lab / "ui.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ, start_new_session=True
        )
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{base}/health", timeout=2)
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.5)
        yield base, Tracker(Settings.load()), log.read_text()
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def test_charts_compare_and_attention_are_drawn_in_the_ui(ui: tuple[str, Tracker, str]) -> None:
    base, tracker, printed = ui
    charts = next(line.split()[1] for line in printed.splitlines() if line.startswith("charts"))
    compare = next(line.split()[1] for line in printed.splitlines() if line.startswith("compare"))
    trial = tracker.client.search_runs([tracker.experiment_id], "tags.`lm.trial` = '0'")[0]
    with open_browser(base) as (page, _):
        page.goto(charts)
        page.wait_for_selector(".js-plotly-plot", timeout=60_000)
        page.wait_for_timeout(2000)
        screenshot(page, "mlflow-charts")
        assert "trial 00" in page.content()
        shown = page.locator("body").inner_text()
        places = [shown.index(f"\n{name}\n") for name in ("Model metrics", "validation_perplexity", "train_perplexity")]
        assert places == sorted(places)
        assert shown.index("attention_entropy\n(") > places[-1]
        assert "layer1_head1" not in shown  # groups of heads are closed

        page.goto(compare)
        page.wait_for_selector("text=Comparing 4 Runs", timeout=60_000)
        screenshot(page, "mlflow-compare")

        for artifact, title in (("attention/epoch_002.html", "epoch 2"), ("attention.html", "over training")):
            page.goto(tracker.run_link(base, trial.info.run_id, artifact))
            page.reload()  # the address of another artifact of the same run alone changes nothing
            frame = page.frame_locator("iframe")
            frame.locator(f"h1:has-text('{title}')").wait_for(timeout=60_000)
            frame.locator("#head0 .heatmaplayer image").wait_for(timeout=60_000)
            frame.locator("#grid button[data-layer='1'][data-head='1']").click()
            assert "layer 2, head 2" in frame.locator("#head0").inner_text()
        frame.locator("#epoch").fill("1")
        frame.locator("#show").select_option("previous")
        assert "epoch 1, layer 2, head 2, minus epoch 0" in frame.locator("#head0").inner_text()
        screenshot(page, "mlflow-attention")


def test_a_taken_port_is_one_line(lab: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, str(ROOT / "experiments/ui.py"), "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("ui.py: the port must be free: got ")
