"""A corpus ready to train on: its facts, the texts that are looked at, and how figures on it are named and said."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from experiments.cli import is_terminal
from experiments.settings import Settings
from lm import data, generate
from lm.config import Config, DataConfig
from lm.corpus import Corpus, load_corpus
from lm.errors import UserError
from lm.evaluate import Scores, bits_per_byte
from lm.overlap import RUN

_SAMPLE_PROMPT_TOKENS = 4
_SHARED_TEXTS, _LONGEST_PROBE, _LONGEST_TAG = 2, 256, 5000


@dataclass(frozen=True)
class Text:
    """A corpus ready to train on."""

    corpus: Corpus
    tokens: data.TokenizedCorpus

    @cached_property
    def digest(self) -> str:
        """Of the tokens: text and vocabulary. Perplexities compare where this is equal."""
        return hashlib.sha256(f"{self.corpus.digest} {self.tokens.vocab.to_json()}".encode()).hexdigest()

    @cached_property
    def baseline(self) -> dict[str, float]:
        """`figures` of the n-gram model: `baseline_perplexity` on validation, `baseline_test_perplexity`, and so on."""
        made: dict[str, float] = {}
        for split, name in (("validation", "baseline"), ("test", "baseline_test")):
            if len(self.tokens.baseline_nats[split]):
                made |= figures(self, split, Scores(self.tokens.baseline_nats[split]), name)
        return made

    @cached_property
    def shares(self) -> dict[str, float]:
        """How much of validation and test is unknown words, and how much of it stands in train."""
        made: dict[str, float] = {}
        for split in ("validation", "test"):
            table = self.tokens.records[split]
            if len(table):
                made |= {
                    f"{split}_unknown_share": float(np.mean(self.tokens.ids[split] == self.tokens.vocab.unk_id)),
                    f"{split}_answers_in_train_share": float(table["copied"].mean()),
                    f"{split}_runs_in_train_share": float(table["shared"].mean()),
                    f"{split}_clean_share": float(self.tokens.clean(split).mean()),
                }
        return made


def read_text(config: DataConfig, settings: Settings) -> Text:
    """Read and tokenise the corpus, from the cache where it is there."""
    corpus = load_corpus(config, settings.cache, settings.wikiqa_dir, settings.wikiqa_revision)
    return Text(corpus, data.tokenize(corpus, config, settings.cache, is_terminal()))


def check(text: Text, config: Config, seed_text: str | None) -> str:
    """Check what only the text can tell, before any run begins, and return the seed text of generated samples.

    Returns:
        the seed text that was given, or the first known words of the validation text.

    Raises:
        UserError: a split shorter than a window, or a seed text without a word of the vocabulary.
    """
    vocab = text.tokens.vocab
    for split in ("train", "validation"):
        text.tokens.windows(split, config.model.seq_len)
    if seed_text is None:
        known = (int(i) for i in text.tokens.ids["validation"] if i != vocab.unk_id)
        seed_text = vocab.decode(list(itertools.islice(known, _SAMPLE_PROMPT_TOKENS)))
    generate.encode_prompt(vocab, seed_text)
    return seed_text


def probes(text: Text, config: Config, own: Sequence[str] = ()) -> dict[str, list[int]]:
    """The texts whose attention is kept at each epoch, by name, as ids, at most a window and `_LONGEST_PROBE` tokens.

    Two stretches of validation text, each from the start of a record that the split's seed draws, are the same for all
    runs on a corpus with one window length; a person's own texts follow.
    """
    n, ids, table = _probe_tokens(config), text.tokens.ids["validation"], text.tokens.records["validation"]
    starts = np.concatenate([[0], np.cumsum(table["tokens"])[:-1]])
    starts = np.unique(starts[starts <= max(0, len(ids) - n)])
    chosen = np.random.default_rng(config.data.split_seed).permutation(starts)[:_SHARED_TEXTS]
    made = {f"validation {i + 1}": [int(x) for x in ids[start : start + n]] for i, start in enumerate(chosen)}
    return made | {f"probe {i + 1}": text.tokens.vocab.encode(words)[:n] for i, words in enumerate(own)}


def check_probes(text: Text, config: Config, own: Sequence[str]) -> list[str]:
    """What is not shown of a person's own texts as they wrote it: the end past the window, and unknown words.

    Raises:
        UserError: an own text without a token, or more text than a run can remember.
    """
    notes, n = list[str](), _probe_tokens(config)
    if len(probes_tag(own)) > _LONGEST_TAG:
        raise UserError(
            f"probes must have at most {_LONGEST_TAG:,} characters together: got {len(probes_tag(own)):,}. "
            f"Try shorter ones: {n} tokens of each are shown."
        )
    for i, words in enumerate(own):
        encoded = text.tokens.vocab.encode(words)
        if not encoded:
            raise UserError(f"a probe must hold a word: got {words!r}. Try --probe 'what is an otter?'.")
        if len(encoded) > n:
            notes.append(f"probe {i + 1}: the first {n} of its {len(encoded)} tokens are kept")
        if unknown := encoded[:n].count(text.tokens.vocab.unk_id):
            notes.append(f"probe {i + 1}: {unknown} of its words are not in the vocabulary and stand as <unk>")
    return notes


def probes_tag(own: Sequence[str]) -> str:
    """A person's own texts as the value of a tag."""
    return json.dumps(own, ensure_ascii=False)


def _probe_tokens(config: Config) -> int:
    return min(config.model.seq_len, _LONGEST_PROBE)


def figures(text: Text, split: str, scores: Scores, name: str | None = None) -> dict[str, float]:
    """What the scores of a split come to, by metric name; `name` stands before each (default: the split).

    The perplexity of clean records is left out where there is no clean record.
    """
    name, table = name or split, text.tokens.records[split]
    total = scores.total
    made = {
        f"{name}_loss": total.nll,
        f"{name}_perplexity": total.perplexity,
        f"{name}_bits_per_byte": bits_per_byte(
            scores, len(text.tokens.vocab), float(table["written_nats"].sum()), int(table["bytes"].sum())
        ),
    }
    clean = scores.where(text.tokens.of_targets(split, text.tokens.clean(split)))
    if clean is not None:
        made[f"{name}_clean_perplexity"] = clean.perplexity
    return made


def describe(text: Text) -> str:
    """Two lines: what of the validation text is unknown or in train already, and the baseline on it."""
    shares, baseline = text.shares, text.baseline
    clean = baseline.get("baseline_clean_perplexity")
    on_clean = f"{clean:.2f} on clean records" if clean else "there is no clean record"
    seen, of = data.BASELINE_TOKENS, len(text.tokens.ids["train"])
    part = f" of the first {seen / 1e6:.1f} of {of / 1e6:,.1f} million tokens" if of > seen else ""
    return (
        f"validation: {shares['validation_unknown_share']:.1%} of tokens unknown; in train stand "
        f"{shares['validation_answers_in_train_share']:.1%} of its answers and a run of {RUN} words of "
        f"{shares['validation_runs_in_train_share']:.1%} of its records; "
        f"{shares['validation_clean_share']:.1%} are clean\n"
        f"baseline: Kneser-Ney {data.BASELINE_ORDER}-gram{part}, validation perplexity "
        f"{baseline['baseline_perplexity']:.2f}, {on_clean}"
    )


def against_baseline(found: Mapping[str, float], name: str, baseline: Mapping[str, float]) -> str:
    """The figures of `name` (validation, test, sliding_test, ...) beside the n-gram model's, in words."""
    other = "baseline_test" if name.endswith("test") else "baseline"

    def beside(kind: str) -> str:
        if f"{name}_{kind}" not in found:
            return "none, there is no clean record"
        value, reference = found[f"{name}_{kind}"], baseline[f"{other}_{kind}"]
        return f"{value:.2f} (baseline {reference:.2f}, {value / reference - 1:+.1%})"

    return (
        f"perplexity {beside('perplexity')}, on clean records {beside('clean_perplexity')}, "
        f"{found[f'{name}_bits_per_byte']:.3f} bits a byte"
    )
