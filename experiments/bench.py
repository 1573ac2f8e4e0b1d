"""Time this project against the write-up's loop, Hugging Face's GPT-2 and the machine's own limit, in one run.

python experiments/bench.py train                    one training step, side by side
python experiments/bench.py train --quick --json     under 50 s at the reference shape, one JSON object
python experiments/bench.py generate --seq-len 256   20 tokens after 12
python experiments/bench.py startup                  --help, first step, served model
python experiments/bench.py serve                    requests a second, by 1, 8 and 32 clients
python experiments/bench.py study                    the default study against the write-up's loop; long
python experiments/bench.py growth                   time and memory against vocabulary, window, layers and corpus
python experiments/bench.py parallel                 one process against two that train one model
python experiments/bench.py corpus                   10 and 100 million tokens read, trained on, gone on with; long
python experiments/bench.py workers                  what the stores of the settings take from up to 64 workers

Contestants take turns in processes of their own; a ratio is the median over rounds. "literal" is the network of the
write-up as most people would write it: nn.TransformerDecoder, fp32, eager Adam. Results are kept in mlruns/bench;
--check fails when a ratio has fallen below those kept for the same shape, machine and versions.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import cli
from experiments.search_space import PATIENCE
from lm.config import Config, ModelConfig, TrainConfig
from lm.errors import UserError

if TYPE_CHECKING:
    from experiments.rivals import Job

Say = Callable[[str], None]

VOCAB_SIZE = 18_707
"""WikiQA's vocabulary under the recipe."""
TOLERANCE = 0.85
"""Share of the median of kept ratios below which `--check` fails."""
_MODES = ("train", "generate", "startup", "serve", "study", "growth", "parallel", "corpus", "workers")
_WITH_RATIOS = ("train", "generate", "serve", "study")
_TRAIN = {"ours": 4, "gpt2": 3, "literal": 1, "matmul": 6}
_GENERATE = {
    "one text": 2, "one text, no cache": 2, "32 texts": 1, "one long text": 2, "one long text, no cache": 1,
    "gpt2, one text": 2, "gpt2, 32 texts": 1,
}  # fmt: skip
_QUICK_SECONDS, _SECONDS, _MOST_ROUNDS = 22.0, 120.0, 12


def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, measure one mode, print a table or one JSON object, keep it, and check it against earlier ones."""
    parser = cli.Parser(__doc__ or "")
    parser.add_argument("mode", choices=_MODES, help="what to time")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help=f"words (default: {VOCAB_SIZE:,})")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds: train and generate end within 50 s at the reference shape"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--check", action="store_true", help="fail when a ratio is below those kept")
    cli.add_config_flags(parser)
    args = parser.parse(argv)
    config = cli.config_of(args, **({"patience": PATIENCE} if args.mode == "study" else {}))
    _require_read(args.mode, cli.given(args))
    if args.check and args.mode not in _WITH_RATIOS:
        raise UserError(f"--check needs ratios: got {args.mode}. Try one of {', '.join(_WITH_RATIOS)}.")
    if args.vocab_size < 2:
        raise UserError(f"vocab_size must be at least 2: got {args.vocab_size}. Try --vocab-size {VOCAB_SIZE}.")

    from experiments import rivals
    from experiments.settings import Settings

    kept = Settings.load().mlruns / "bench" / f"{args.mode}.jsonl"
    job = rivals.Job(config, args.vocab_size)
    result: dict[str, Any] = {"mode": args.mode, "shape": _shape(job, args.quick), **about(job)}
    usual = _usual(result, kept) if args.check else {}
    say = _quiet if args.json else _aloud
    if args.mode == "train":
        found = train(job, args.quick, say)
    elif args.mode == "generate":
        found = generate(job, args.quick, say)
    else:
        from experiments import bench_programs, growth, scale

        measure = {
            "startup": bench_programs.startup,
            "serve": bench_programs.serve,
            "study": bench_programs.study,
            "growth": growth.measure,
            "parallel": scale.parallel,
            "corpus": scale.corpus,
            "workers": scale.workers,
        }
        found = measure[args.mode](job, args.quick, say)
    result |= found
    fallen = [
        f"{name} {result[name]:.2f} against {value:.2f}"
        for name, value in usual.items()
        if result.get(name, 0.0) < TOLERANCE * value
    ]
    if not fallen:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.open("a", encoding="utf-8") as f:
            f.write(json.dumps(result) + "\n")
    if args.json:
        print(json.dumps(result))
    elif not fallen:
        print(f"kept in  {kept}")
    if fallen:
        raise UserError(f"ratios must not fall: got {'; '.join(fallen)}. Try the same again, then look for the cause.")


def _require_read(mode: str, given: Mapping[str, Any]) -> None:
    """Refuse a flag that the mode would not read."""
    read = {name for section in (ModelConfig, TrainConfig) for name in (field.name for field in fields(section))}
    if mode in ("startup", "serve", "workers"):
        read = set()
    elif mode != "study":
        read -= {"epochs", "patience", "schedule", "warmup_steps", "seed", "steps_per_epoch"}
        read -= set() if mode == "parallel" else {"parallel"}
    for name in given:
        if name not in read:
            flag = name.replace("_", "-")
            raise UserError(f"a flag must be one that bench.py {mode} reads: got --{flag}. Try without it.")


def _aloud(line: str) -> None:
    print(line, flush=True)


def _quiet(line: str) -> None:
    del line


def flops_a_token(config: Config, vocab_size: int) -> float:
    """Of a training step: 6 times the weights in matrix products (Kaplan et al. 2020), and 12 L T D for attention."""
    shape = config.model
    layer = 4 * shape.d_model**2 + 2 * shape.d_model * shape.d_ff
    weights = shape.n_layers * layer + shape.d_model * vocab_size
    return 6.0 * weights + 12.0 * shape.n_layers * shape.seq_len * shape.d_model


def take_turns(job: Job, turns: Mapping[str, int], quick: bool, say: Say) -> tuple[dict[str, list[float]], Any]:
    """Median seconds of a step in each round, for each contestant, and the most memory each had (MiB)."""
    from experiments.rivals import Contestant

    started = time.perf_counter()
    contestants: list[Contestant] = []
    rounds: dict[str, list[float]] = {name: [] for name in turns}
    try:
        contestants.extend(Contestant(name, job) for name in turns)
        for contestant in contestants:
            contestant.run(1 if contestant.name == "literal" else 3)
        budget = _QUICK_SECONDS if quick else _SECONDS
        say(f"{', '.join(turns)}: ready after {time.perf_counter() - started:.0f} s, about {budget:.0f} s to go")
        started = time.perf_counter()
        while len(rounds[contestants[0].name]) < _MOST_ROUNDS:
            for contestant in contestants:
                rounds[contestant.name].append(statistics.median(contestant.run(turns[contestant.name])))
            n, past = len(rounds[contestants[0].name]), time.perf_counter() - started
            if past + past / n > budget:
                break
    finally:
        peaks = {contestant.name: contestant.close() for contestant in contestants}
    return rounds, peaks


def _ratio(rounds: Mapping[str, list[float]], name: str, to: str) -> float:
    """How many times as fast as `to` it was: the median over rounds."""
    return statistics.median(b / a for a, b in zip(rounds[name], rounds[to], strict=True))


def _summary(rounds: Mapping[str, list[float]], peaks: Mapping[str, float]) -> dict[str, Any]:
    return {
        name: {
            "seconds": statistics.median(times),
            "from": min(times),
            "to": max(times),
            "rounds": len(times),
            "peak_mib": round(peaks[name]),
        }
        for name, times in rounds.items()
    }


def _table(summary: Mapping[str, Mapping[str, Any]], tokens: Mapping[str, int], say: Say) -> None:
    width = max(map(len, summary))
    say(f"{'':{width}}  {'median':>9}  {'from':>9}  {'to':>9}  {'tokens/s':>9}  {'memory':>9}")
    for name, row in summary.items():
        milliseconds = "  ".join(f"{1e3 * row[key]:6.0f} ms" for key in ("seconds", "from", "to"))
        rate = f"{tokens[name] / row['seconds']:9,.0f}" if name in tokens else " " * 9
        say(f"{name:{width}}  {milliseconds}  {rate}  {row['peak_mib']:5,} MiB")


def train(job: Job, quick: bool, say: Say) -> dict[str, Any]:
    """One training step of each contestant."""
    from experiments.rivals import MATMUL

    rounds, peaks = take_turns(job, _TRAIN, quick, say)
    summary = _summary(rounds, peaks)
    _table(summary, dict.fromkeys(("ours", "gpt2", "literal"), job.tokens), say)
    flops = flops_a_token(job.config, job.vocab_size)
    fractions = [
        flops * job.tokens / ours / (2 * MATMUL**3 / limit)
        for ours, limit in zip(rounds["ours"], rounds["matmul"], strict=True)
    ]
    found = {
        "tokens_per_second": job.tokens / summary["ours"]["seconds"],
        "ratio_vs_literal": _ratio(rounds, "ours", "literal"),
        "ratio_vs_gpt2": _ratio(rounds, "ours", "gpt2"),
        "fraction_of_matmul_rate": statistics.median(fractions),
        "matmul_flops_per_second": 2 * MATMUL**3 / summary["matmul"]["seconds"],
        "flops_a_token": flops,
    }
    limit = found["matmul_flops_per_second"] / flops / (job.tokens / summary["literal"]["seconds"])
    say(f"{found['ratio_vs_literal']:.2f} x the write-up's loop (at the machine's own limit it would be {limit:.1f} x)")
    say(f"{found['ratio_vs_gpt2']:.2f} x GPT-2")
    rate = found["matmul_flops_per_second"] / 1e9
    say(f"{found['fraction_of_matmul_rate']:.0%} of the {rate:,.0f} GFLOP/s of a {MATMUL}-cubed matrix product")
    return {**found, "ratio_limit_vs_literal": limit, "contestants": summary}


def generate(job: Job, quick: bool, say: Say) -> dict[str, Any]:
    """Generation of 20 tokens: with and without the cache, one text and 32, beside GPT-2."""
    from experiments.rivals import NEW, PROMPT

    if job.config.model.seq_len < PROMPT + NEW:
        raise UserError(
            f"the window must hold {PROMPT + NEW} tokens: got seq_len={job.config.model.seq_len}. Try --seq-len 256."
        )
    rounds, peaks = take_turns(job, _GENERATE, quick, say)
    summary = _summary(rounds, peaks)
    _table(summary, {name: 32 * NEW if "32" in name else NEW for name in summary}, say)
    found = {
        "tokens_per_second": NEW / summary["one text"]["seconds"],
        "ratio_vs_no_cache": _ratio(rounds, "one text", "one text, no cache"),
        "ratio_vs_no_cache_long": _ratio(rounds, "one long text", "one long text, no cache"),
        "ratio_vs_gpt2": _ratio(rounds, "one text", "gpt2, one text"),
        "ratio_vs_gpt2_32": _ratio(rounds, "32 texts", "gpt2, 32 texts"),
        "ratio_32_texts": 32 * _ratio(rounds, "32 texts", "one text"),
    }
    say(f"{found['ratio_vs_no_cache']:.2f} x without a cache after {PROMPT} tokens")
    say(f"{found['ratio_vs_no_cache_long']:.2f} x without a cache after {job.config.model.seq_len - NEW} tokens")
    say(f"{found['ratio_vs_gpt2']:.2f} x GPT-2's generate for one text, {found['ratio_vs_gpt2_32']:.2f} x for 32")
    say(f"{found['ratio_32_texts']:.1f} x the tokens a second for 32 texts at once")
    return {**found, "contestants": summary}


def _shape(job: Job, quick: bool) -> dict[str, Any]:
    return {**job.config.flat(), "vocab_size": job.vocab_size, "quick": quick}


def about(job: Job) -> dict[str, Any]:
    """Machine, versions and time of a result."""
    from importlib.metadata import PackageNotFoundError, version

    from lm import runtime

    versions: dict[str, str] = {}
    for package in ("torch", "transformers", "mlflow"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    device = runtime.resolve_device(job.config.train.device)
    precision = runtime.resolve_precision(job.config.train.precision, device)
    return {
        "machine": f"{runtime.processor()}, {os.cpu_count()} cores; {runtime.describe(device, precision)}",
        "versions": versions,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _usual(result: Mapping[str, Any], kept: Path) -> dict[str, float]:
    """The median of each ratio that was kept for this shape and machine.

    Raises:
        UserError: none was.
    """
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    alike = ("shape", "machine", "versions")
    complete = [json.loads(line) for line in lines if line.endswith("}")]  # a killed process leaves half a line
    same = [earlier for earlier in complete if all(earlier[key] == result[key] for key in alike)]
    if not same:
        raise UserError(
            f"--check needs an earlier result of this shape, machine and these versions: got none in {kept}. "
            "Try without --check first."
        )
    names = sorted(name for name in same[-1] if name.startswith(("ratio_vs", "ratio_32", "fraction")))
    return {name: statistics.median(earlier[name] for earlier in same if name in earlier) for name in names}


if __name__ == "__main__":
    cli.run(main)
