"""A model as a service to several callers: requests checked, batched through one cache, bounded, answered or refused.

Knows no server: `experiments/serving_model.py` stands between this and MLflow's.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from lm import generate
from lm.errors import UserError
from lm.generate import Prompt, Sampling, Token
from lm.model import Decoder
from lm.vocab import Vocab

PARAMS: dict[str, Any] = {
    "max_new_tokens": 20,
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "stop": [""],
    "seed": -1,
    "num_return_sequences": 1,
    "return": "text",
}
"""What a request may set, with defaults; a seed of -1 draws a new one, an empty `stop` stops nowhere."""

_ROWS = 32
"""Texts that are continued at once."""
_IDLE_SECONDS = 1.0
_LONGEST = 200
"""Characters of a caller's own words that an error repeats."""


class BusyError(Exception):
    """More is waiting than may wait."""


class DeadlineError(Exception):
    """The time was up before the answer was complete."""


@dataclass(frozen=True)
class Limits:
    """Sizes of what is served; each has an environment setting in the served model."""

    characters: int = 10_000
    inputs: int = 64
    new_tokens: int = 1_000
    body_bytes: int = 1_000_000
    waiting: int = 64
    deadline_seconds: float = 30.0


@dataclass
class Answer:
    """One continued text, which begins with the prompt as the model reads it.

    Each new token has its log-probability (nats, under the model itself). It ended by `length`, `stop` or `deadline`.
    """

    prompt: str
    text: str = ""
    tokens: list[str] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    finish_reason: str = ""
    prompt_perplexity: float | None = None

    def full(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": self.tokens,
            "log_probabilities": self.log_probabilities,
            "finish_reason": self.finish_reason,
            "prompt_perplexity": self.prompt_perplexity,
        }


@dataclass
class _Row:
    """A text in work: what was asked, what there is so far, and whom to tell."""

    prompt: Prompt
    answer: Answer
    stops: list[str]
    deadline: float
    call: _Call
    full: bool
    live: bool = False
    ids: list[int] = field(default_factory=list)


@dataclass
class _Call:
    """A caller who waits for so many rows."""

    left: int
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


class Service:
    """Answers calls from any number of threads, first come first served.

    One thread of its own runs the model, and ends when there is nothing to do.

    Args:
        model: as `generate.for_generation` makes it.
        vocab: of the model.
        limits: sizes.
    """

    def __init__(self, model: Decoder, vocab: Vocab, limits: Limits | None = None) -> None:
        self.model, self.vocab, self.limits = model, vocab, limits or Limits()
        self._waiting: deque[_Row] = deque()
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None

    def answer(self, inputs: Sequence[str], params: Mapping[str, Any]) -> list[Answer]:
        """Continue each input `num_return_sequences` times; the sequences of an input stand together.

        A text has the tokens that it would have alone. With a seed the sequences of an input have that seed and those
        that follow.

        Raises:
            UserError: what the caller can mend.
            DeadlineError: the time was up, and `return` is not "full", which shows what there is.
        """
        values = self.check(inputs, params)
        deadline = time.monotonic() + self.limits.deadline_seconds
        rows = self._rows(inputs, values, deadline)
        with self._changed:
            self._waiting.extend(rows)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work)
                self._worker.start()
            self._changed.notify()
        call = rows[0].call if rows else _Call(0)
        if rows and not call.done.wait(2 * self.limits.deadline_seconds):
            raise RuntimeError("the model's thread has not answered")
        if call.error is not None:
            raise call.error
        answers = [row.answer for row in rows]
        late = [answer for answer in answers if answer.finish_reason == "deadline"]
        if late and values["return"] != "full":
            raise DeadlineError(
                f"an answer must be made in {self.limits.deadline_seconds:g} s: got {len(late[0].tokens)} of "
                f"{values['max_new_tokens']} tokens. Try fewer max_new_tokens, or return=full for those there are."
            )
        return answers

    def stream(self, text: str, params: Mapping[str, Any]) -> Iterator[str]:
        """The pieces of one continuation as they come; together they are its text after the prompt.

        Raises:
            UserError: what the caller can mend.
        """
        values = self.check([text], {**params, "num_return_sequences": 1})
        [row] = self._rows([text], values, time.monotonic() + self.limits.deadline_seconds)
        row.live, said = True, row.answer.text
        for token in generate.generate_ids(self.model, [row.prompt], banned=self.vocab.unk_id):
            ended = self._take(row, token)
            yield row.answer.text[len(said) :]
            said = row.answer.text
            if ended:
                return

    def candidates(self, text: str, n: int = 10) -> list[tuple[str, float]]:
        """The likeliest next tokens after a text, with their probabilities.

        Raises:
            UserError: a text without a known word.
        """
        logits_BV, _ = generate.next_token_logits(
            self.model, [generate.encode_prompt(self.vocab, text)[-self.model.seq_len :]], None
        )
        likeliest = logits_BV[0].softmax(-1).topk(min(n, logits_BV.shape[1]))
        return [
            (self.vocab.decode([i]), p)
            for p, i in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
        ]

    def check(self, inputs: Sequence[str], params: Mapping[str, Any]) -> dict[str, Any]:
        """All params with their values.

        Raises:
            UserError: an unknown param, with the nearest known one, or a value, size or input against its rule.
        """
        for name in params:
            if name not in PARAMS:
                near = get_close_matches(str(name), PARAMS, n=1)
                remedy = near[0] if near else "one of them"
                raise UserError(f"params must be among {', '.join(PARAMS)}: got {_quoted(name)}. Try {remedy}.")
        values = {**PARAMS, **params}
        for name, default in PARAMS.items():
            values[name] = _typed(name, values[name], default)
        limits = self.limits
        _require(1 <= len(inputs) <= limits.inputs, "inputs", f"be 1 to {limits.inputs}", len(inputs), "several calls")
        for text in inputs:
            if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers are strangers
                raise UserError(f"an input must be text: got {_quoted(text)}. Try a string.")
            size = len(text)
            _require(
                size <= limits.characters, "an input", f"have at most {limits.characters:,} characters", size, "less"
            )
        for name, most in (("max_new_tokens", limits.new_tokens), ("num_return_sequences", limits.inputs)):
            _require(1 <= values[name] <= most, name, f"be from 1 to {most:,}", values[name], f"{name}={PARAMS[name]}")
        rows = values["num_return_sequences"] * len(inputs)
        _require(
            rows <= limits.inputs, "num_return_sequences times inputs", f"be at most {limits.inputs}", rows, "fewer"
        )
        _require(-1 <= values["seed"] < 2**62, "seed", "be -1 (a new one) or 0 to 2**62", values["seed"], "seed=0")
        _require(values["return"] in ("text", "full"), "return", "be text or full", values["return"], "return=full")
        stops = values["stop"]
        _require(
            len(stops) <= 8 and all(len(s) <= _LONGEST for s in stops),
            "stop",
            f"be up to 8 texts of up to {_LONGEST} characters",
            len(stops),
            "fewer",
        )
        return values

    def _rows(self, inputs: Sequence[str], values: Mapping[str, Any], deadline: float) -> list[_Row]:
        how = Sampling(**{name: values[name] for name in Sampling.__dataclass_fields__})
        call, rows = _Call(len(inputs) * values["num_return_sequences"]), list[_Row]()
        for text in inputs:
            ids = generate.encode_prompt(self.vocab, text)
            shown = self.vocab.decode(ids)
            for i in range(values["num_return_sequences"]):
                seed = None if values["seed"] == -1 else values["seed"] + i
                prompt = Prompt(ids, values["max_new_tokens"], how, seed)
                stops = [stop for stop in values["stop"] if stop]
                rows.append(
                    _Row(prompt, Answer(prompt=shown, text=shown), stops, deadline, call, values["return"] == "full")
                )
        return rows

    def _work(self) -> None:
        """Run batches until none has come for a second: a thread that stayed would be cut off when the process ends."""
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: bool(self._waiting), timeout=_IDLE_SECONDS):
                    self._worker = None
                    return
                rows = [self._waiting.popleft() for _ in range(min(_ROWS, len(self._waiting)))]
            try:
                self._run(rows)
            except Exception as e:
                for row in rows:
                    if not row.answer.finish_reason:
                        row.call.error = e
                        row.call.done.set()

    def _run(self, rows: Sequence[_Row]) -> None:
        ended: set[int] = set()
        for i, row in enumerate(rows):
            if time.monotonic() > row.deadline:  # it has waited too long
                self._finish(row, "deadline")
                ended.add(i)
            elif row.full:
                row.answer.prompt_perplexity = generate.perplexity(self.model, row.prompt.ids)
        living = [i for i in range(len(rows)) if i not in ended]
        done: set[int] = set()
        for token in generate.generate_ids(
            self.model, [rows[i].prompt for i in living], banned=self.vocab.unk_id, ended=done
        ):
            row = rows[living[token.text]]
            if not row.answer.finish_reason and self._take(row, token):
                done.add(token.text)
                self._tell(row.call)

    def _take(self, row: _Row, token: Token) -> bool:
        """Add a token to its answer; returns whether that was the last one."""
        row.ids.append(token.id)
        answer = row.answer
        answer.tokens.append(self.vocab.decode([token.id]))
        answer.log_probabilities.append(token.log_p)
        if len(row.ids) == row.prompt.max_length:
            answer.finish_reason = "length"
        elif time.monotonic() > row.deadline:
            answer.finish_reason = "deadline"
        if row.stops or row.live or answer.finish_reason:
            answer.text = self.vocab.decode([*row.prompt.ids, *row.ids])
            new = answer.text[len(answer.prompt) :]
            at = min((new.find(stop) for stop in row.stops if stop in new), default=-1)
            if at >= 0:
                answer.text, answer.finish_reason = answer.prompt + new[:at], "stop"
        return bool(answer.finish_reason)

    def _finish(self, row: _Row, reason: str) -> None:
        row.answer.finish_reason = reason
        self._tell(row.call)

    def _tell(self, call: _Call) -> None:
        call.left -= 1
        if call.left == 0:
            call.done.set()


def _typed(name: str, value: Any, default: Any) -> Any:
    """The value as the type of its default; whole numbers serve as fractions."""
    if isinstance(default, list):
        values: Any = [value] if isinstance(value, str) else value
        if hasattr(values, "tolist"):  # numpy's, as MLflow may make of it
            values = values.tolist()
        if isinstance(values, list) and all(isinstance(v, str) for v in values):
            return values
        raise UserError(f'{name} must be a list of texts: got {_quoted(value)}. Try {name}=["."].')
    kind = type(default)
    if hasattr(value, "item"):
        value = value.item()
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**53 else float("inf")
    if isinstance(value, bool) or not isinstance(value, kind) or (kind is int and abs(value) >= 2**63):
        said = {int: "a whole number below 2**63", float: "a number", str: "a text"}[kind]
        raise UserError(f"{name} must be {said}: got {_quoted(value)}. Try {name}={default}.")
    return value


def _quoted(value: object) -> str:
    return ascii(value)[:_LONGEST]


def _require(holds: bool, name: str, rule: str, got: object, remedy: str) -> None:
    if not holds:
        raise UserError(f"{name} must {rule}: got {_quoted(got)}. Try {remedy}.")


def settings_of(environment: Mapping[str, str]) -> Limits:
    """Limits from `LM_SERVE_CHARACTERS` and its like.

    Raises:
        UserError: a value that is no number above 0.
    """
    found: dict[str, Any] = {}
    for name, default in Limits().__dict__.items():
        written = environment.get(f"LM_SERVE_{name.upper()}")
        if written:
            kind: Callable[[str], float] = type(default)
            try:
                found[name] = kind(written)
            except ValueError:
                found[name] = 0
            _require(found[name] > 0, f"LM_SERVE_{name.upper()}", "be a number above 0", written, f"{default}")
    return Limits(**found)
