"""A model as a service to several callers: requests checked, batched through one cache, bounded, answered or refused.

Knows no server: `experiments/serving_model.py` stands between this and MLflow's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import zip_longest
from typing import Any

import torch

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
_SLICE = 32
"""Tokens of a text before others have their turn."""
_IDLE_SECONDS = 1.0
_LONGEST = 200
"""Characters of a caller's own words that an error repeats."""


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

    Each new token has its log-probability (nats, under the model itself); those of a `stop` are among them. It ended by
    `length`, `stop` or `deadline`.
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
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)

    def rest(self) -> Prompt:
        """What is still to be made, as a prompt of its own."""
        asked = self.prompt
        left = min(_SLICE, asked.max_length - len(self.ids))
        return Prompt([*asked.ids, *self.ids], left, asked.sampling)


@dataclass
class _Call:
    """A caller who waits for so many rows, and for the perplexity of the prompts that are `unmeasured`."""

    left: int
    unmeasured: set[str] = field(default_factory=set)
    measured: dict[str, float | None] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def tell(self) -> None:
        """One row less."""
        self.left -= 1
        if self.left == 0:
            self.done.set()

    def fail(self, error: Exception) -> None:
        """End all of its rows."""
        self.error = error
        self.done.set()


class _Ended:
    """Which rows of a batch shall get no more tokens: those that have ended, and those whose time is up."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __contains__(self, i: object) -> bool:
        row = self._rows[i]  # pyright: ignore[reportArgumentType, reportCallIssue]
        return bool(row.answer.finish_reason) or time.monotonic() > row.deadline


class Service:
    """Answers calls from any number of threads, a few tokens of each in turn.

    One thread of its own runs the model, and ends when there is nothing to do.

    Args:
        model: as `generate.for_generation` makes it.
        vocab: of the model.
        limits: sizes.
    """

    def __init__(self, model: Decoder, vocab: Vocab, limits: Limits | None = None) -> None:
        self.model, self.vocab, self.limits = model, vocab, limits or Limits()
        self._waiting: list[_Row] = []
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None

    def answer(self, inputs: Sequence[str], params: Mapping[str, Any]) -> list[Answer]:
        """Continue each input `num_return_sequences` times; the sequences of an input stand together.

        A text has the tokens that it would have alone, but for the rounding of logits. With a seed the sequences of an
        input have that seed and those that follow.

        Raises:
            UserError: what the caller can mend.
            DeadlineError: the time was up, and `return` is not "full", which shows what there is.
        """
        values = self.check(inputs, params)
        rows = self._rows(inputs, values)
        call = rows[0].call
        with self._changed:
            self._waiting.extend(rows)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work)
                self._worker.start()
            self._changed.notify()
        if not call.done.wait(2 * self.limits.deadline_seconds + 60):
            raise RuntimeError("the model's thread has not answered")
        if call.error is not None:
            raise call.error
        answers = [row.answer for row in rows]
        for answer in answers:
            answer.prompt_perplexity = call.measured.get(answer.prompt)
        late = [answer for answer in answers if answer.finish_reason == "deadline"]
        if late and values["return"] != "full":
            raise self._too_late(late[0], values)
        return answers

    def stream(self, text: str, params: Mapping[str, Any]) -> Iterator[str]:
        """The pieces of one continuation as they come; together they are its text after the prompt.

        What may turn out to be the beginning of a `stop`, or half of a character, is held back until it is known.

        Raises:
            UserError: what the caller can mend.
            DeadlineError: the time was up.
        """
        values = self.check([text], {**params, "num_return_sequences": 1})
        [row] = self._rows([text], values)
        held, said = max((len(stop) - 1 for stop in row.stops), default=0), len(row.answer.text)
        for token in generate.generate_ids(
            self.model, [row.prompt], banned=self.vocab.unk_id, ended=_Ended([row]), generators=[row.generator]
        ):
            ended = self._take(row, token, with_text=True)
            sure = row.answer.text if ended else row.answer.text[: len(row.answer.text) - held].rstrip("\ufffd")
            yield sure[said:]
            said = max(said, len(sure))
        if row.answer.finish_reason in ("", "deadline"):
            raise self._too_late(row.answer, values)

    def _too_late(self, answer: Answer, values: Mapping[str, Any]) -> DeadlineError:
        return DeadlineError(
            f"an answer must be made in {self.limits.deadline_seconds:g} s: got {len(answer.tokens)} of "
            f"{values['max_new_tokens']} tokens. Try fewer max_new_tokens, or return=full for those there are."
        )

    def candidates(self, text: str, n: int = 10) -> list[tuple[str, float]]:
        """The likeliest next tokens after a text, with their probabilities.

        Raises:
            UserError: a text without a known word.
        """
        ids = generate.encode_prompt(self.vocab, text)[-self.model.seq_len :]
        logits_BV, _ = generate.next_token_logits(self.model, [ids], None)
        logits_V = logits_BV[0].index_fill(0, torch.tensor([self.vocab.unk_id]), -torch.inf)
        likeliest = logits_V.softmax(-1).topk(min(n, len(logits_V) - 1))
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
        if isinstance(inputs, str):
            raise UserError(f"inputs must be a list of texts: got {_quoted(inputs)}. Try a list of one.")
        n = len(inputs)
        _require(
            1 <= n <= limits.inputs, "inputs", f"be 1 to {limits.inputs}", n, "several calls" if n else '["what is"]'
        )
        for text in inputs:
            if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers are strangers
                raise UserError(f"an input must be text: got {_quoted(text)}. Try a string.")
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise UserError("an input must be Unicode text: got half of a surrogate pair. Try it without.")
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
        _require(
            -1 <= values["seed"] < 2**62,
            "seed",
            "be -1 (a new one), or 0 and above but below 2**62",
            values["seed"],
            "seed=0",
        )
        _require(values["return"] in ("text", "full"), "return", "be text or full", values["return"], "return=full")
        stops = values["stop"]
        _require(len(stops) <= 8, "stop", "be up to 8 texts", len(stops), "fewer")
        longest = max(map(len, stops), default=0)
        _require(longest <= _LONGEST, "a stop", f"have at most {_LONGEST} characters", longest, "a shorter one")
        return values

    def _rows(self, inputs: Sequence[str], values: Mapping[str, Any]) -> list[_Row]:
        deadline = time.monotonic() + self.limits.deadline_seconds
        how = Sampling(**{name: values[name] for name in Sampling.__dataclass_fields__})
        call, rows = _Call(len(inputs) * values["num_return_sequences"]), list[_Row]()
        stops = [stop for stop in values["stop"] if stop]
        for text in inputs:
            ids = generate.encode_prompt(self.vocab, text)
            shown = self.vocab.decode(ids)
            if values["return"] == "full":
                call.unmeasured.add(shown)
            for i in range(values["num_return_sequences"]):
                seed = None if values["seed"] == -1 else values["seed"] + i
                prompt, answer = Prompt(ids, values["max_new_tokens"], how, seed), Answer(prompt=shown, text=shown)
                rows.append(_Row(prompt, answer, stops, deadline, call, generate.new_generator(seed)))
        return rows

    def _work(self) -> None:
        """Run batches until none has come for a second: a thread that stayed would be cut off when the process ends."""
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: bool(self._waiting), timeout=_IDLE_SECONDS):
                    self._worker = None
                    return
                rows = self._next()
            self._run(rows)
            with self._changed:
                self._waiting.extend(row for row in rows if not row.answer.finish_reason)
                self._end_late()

    def _next(self) -> list[_Row]:
        """Take a batch from those that wait: a row of each call in turn, the calls that have waited longest first."""
        calls: dict[int, list[_Row]] = {}
        for row in self._waiting:
            calls.setdefault(id(row.call), []).append(row)
        turns = [row for turn in zip_longest(*calls.values()) for row in turn if row is not None]
        taken = turns[:_ROWS]
        chosen = {id(row) for row in taken}
        self._waiting = [row for row in self._waiting if id(row) not in chosen]
        return taken

    def _run(self, rows: Sequence[_Row]) -> None:
        """Some more tokens for each row; an error is of those calls alone that have it when run without the others."""
        try:
            self._continue(rows)
        except Exception as e:
            calls = {id(row.call): row.call for row in rows}
            if len(calls) == 1:
                rows[0].call.fail(e)
                return
            for call in calls.values():
                self._run([row for row in rows if row.call is call and not row.answer.finish_reason])

    def _continue(self, rows: Sequence[_Row]) -> None:
        for row in rows:
            if row.answer.prompt in row.call.unmeasured and time.monotonic() < row.deadline:
                row.call.unmeasured.remove(row.answer.prompt)
                row.call.measured[row.answer.prompt] = generate.perplexity(self.model, row.prompt.ids)
        for token in generate.generate_ids(
            self.model,
            [row.rest() for row in rows],
            banned=self.vocab.unk_id,
            ended=_Ended(rows),
            generators=[row.generator for row in rows],
        ):
            row = rows[token.text]
            if self._take(row, token):
                row.call.tell()

    def _end_late(self) -> None:
        """End those that wait past their deadline, and leave out those whose call has failed."""
        still: list[_Row] = []
        for row in self._waiting:
            if time.monotonic() > row.deadline and not row.call.done.is_set():
                row.answer.finish_reason = "deadline"
                row.answer.text = self.vocab.decode([*row.prompt.ids, *row.ids])
                row.call.tell()
            elif not row.call.done.is_set():
                still.append(row)
        self._waiting = still

    def _take(self, row: _Row, token: Token, with_text: bool = False) -> bool:
        """Add a token to its answer; returns whether that was the last one."""
        row.ids.append(token.id)
        answer = row.answer
        answer.tokens.append(self.vocab.decode([token.id]))
        answer.log_probabilities.append(token.log_p)
        if len(row.ids) == row.prompt.max_length:
            answer.finish_reason = "length"
        if row.stops or with_text or answer.finish_reason:
            answer.text = self.vocab.decode([*row.prompt.ids, *row.ids])
            new = answer.text[len(answer.prompt) :]
            at = min((new.find(stop) for stop in row.stops if stop in new), default=-1)
            if at >= 0:
                answer.text, answer.finish_reason = answer.prompt + new[:at], "stop"
        return bool(answer.finish_reason)


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


def limits_of(environment: Mapping[str, str]) -> Limits:
    """Limits from `LM_SERVE_CHARACTERS` and its like; the deadline is kept below that of MLflow's server.

    Raises:
        UserError: a value that is no number above 0, or a deadline that the server would not wait for.
    """
    server = environment.get("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT") or "60"
    most = float(server) if server.replace(".", "", 1).isdigit() else 60.0
    found: dict[str, Any] = {}
    for name, default in Limits().__dict__.items():
        written = environment.get(f"LM_SERVE_{name.upper()}")
        if written:
            kind: Callable[[str], float] = type(default)
            try:
                found[name] = kind(written)
            except ValueError:
                found[name] = 0
            whole = "a whole number" if kind is int else "a number"
            _require(0 < found[name] < 2**40, f"LM_SERVE_{name.upper()}", f"be {whole} above 0", written, f"{default}")
    limits = Limits(**found)
    rule = f"be below the server's {most:g} s (MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT)"
    late = limits.deadline_seconds
    _require(late < most, "LM_SERVE_DEADLINE_SECONDS", rule, late, f"{most / 2:g}")
    return limits
