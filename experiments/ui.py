"""Open the MLflow UI on this project's store, and print the links worth a click.

python experiments/ui.py
python experiments/ui.py --port 5050
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from experiments import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, print links, become the MLflow server until Ctrl-C."""
    parser = cli.Parser(__doc__ or "")
    parser.add_argument("--port", type=int, default=5000, help="port of the UI on this machine (default: 5000)")
    args = parser.parse(argv)
    cli.require_free(args.port)

    from experiments.settings import ROOT, Settings
    from experiments.tracking import Tracker

    settings = Settings.load()
    tracker = Tracker(settings)
    base = tracker.ui_address(args.port)
    print(f"charts   {tracker.charts_link(base)}")
    for study, run_ids, summary_id in tracker.studies():
        print(f"study    {study}: {len(run_ids)} runs")
        print(f"compare  {tracker.compare_link(base, run_ids)}")
        if summary_id:
            print(f"report   {tracker.run_link(base, summary_id, 'report.html')}")
    if settings.tracking_uri.startswith("http"):
        print(f"The server is already there: {base}")
        return
    print("Ctrl-C stops the server.", flush=True)
    # One worker and no job consumers: two processes of about 250 MB in all, enough for one person.
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    os.environ["MLFLOW_BACKEND_STORE_URI"] = settings.tracking_uri  # an argument would show a password to `ps`
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(args.port), "--workers", "1"]
    os.chdir(ROOT)
    os.execv(sys.executable, command)


if __name__ == "__main__":
    cli.run(main)
