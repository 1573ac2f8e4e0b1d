"""Requests checked, batched, bounded: without any server."""

import threading
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import generate, service
from lm.config import ModelConfig
from lm.errors import UserError
from lm.model import Decoder
from lm.service import Answer, DeadlineError, Limits, Service
from lm.vocab import Vocab

VOCAB = Vocab.build(["the cat sat on the mat . a dog ran to the house and slept ."], min_count=1)


def new(limits: Limits | None = None, model: type[Decoder] = Decoder) -> Service:
    torch.manual_seed(0)
    shape = ModelConfig(d_model=16, n_layers=2, n_heads=2, d_ff=32, seq_len=8)
    return Service(model(shape, len(VOCAB)).eval(), VOCAB, limits)


SERVICE = new()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temprature": 1.0}, "params must be among max_new_tokens, .*: got 'temprature'. Try temperature."),
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number below .*: got '5'. Try max_new_tokens=20."),
        ({"max_new_tokens": 5.5}, "max_new_tokens must be a whole number below .*: got 5.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number below .*: got True"),
        ({"top_k": 10**400}, "top_k must be a whole number below"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": 10**400}, "temperature must be 0"),
        ({"temperature": None}, "temperature must be a number: got None"),
        ({"stop": ["x" * 201]}, "a stop must have at most 200 characters: got 201"),
        ({"min_p": 1.5}, "min_p must be from 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be from 0.1 to 10"),
        ({"stop": [1]}, "stop must be a list of texts"),
        ({"stop": ["x"] * 9}, "stop must be up to 8 texts"),
        ({"seed": 2**62}, "seed must be -1"),
        ({"num_return_sequences": 65}, "num_return_sequences must be from 1 to 64: got 65"),
        ({"return": "all"}, "return must be text or full: got 'all'. Try return=full."),
    ],
)
def test_a_param_against_its_rule_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SERVICE.answer(["the cat"], params)


def test_half_a_surrogate_pair_is_refused_and_a_tiny_top_p_keeps_one_token() -> None:
    with pytest.raises(UserError, match="an input must be Unicode text: got half of a surrogate pair"):
        SERVICE.answer(["the \ud800 cat"], {})
    with pytest.raises(UserError, match="inputs must be a list of texts: got 'the cat'"):
        SERVICE.answer("the cat", {})
    [least] = SERVICE.answer(["the cat"], {"top_p": 1e-320, "max_new_tokens": 5})
    assert least.tokens == SERVICE.answer(["the cat"], {"temperature": 0.0, "max_new_tokens": 5})[0].tokens


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.lists(JSON, max_size=3),
    st.dictionaries(st.sampled_from(sorted(service.PARAMS)) | st.text(max_size=5), JSON, max_size=3),
)
@settings(deadline=None, max_examples=300)
def test_whatever_is_asked_is_answered_or_refused_in_one_short_line(inputs: list[Any], params: dict[str, Any]) -> None:
    try:
        answers = SERVICE.answer(inputs, {"max_new_tokens": 2, **params})
    except UserError as e:
        assert "\n" not in str(e)
        assert len(str(e)) < 700
        assert ": got " in str(e)
    else:
        assert all(isinstance(answer, Answer) for answer in answers)


def test_an_answer_is_the_same_alone_in_a_batch_and_beside_other_calls() -> None:
    asked = {"max_new_tokens": 9, "temperature": 1.3, "seed": 4}
    [alone] = SERVICE.answer(["the cat"], asked)
    together = SERVICE.answer(["a dog ran to the house", "the cat", "mat"], asked)
    assert together[1].tokens == alone.tokens
    assert together[1].log_probabilities == pytest.approx(alone.log_probabilities, abs=1e-4)
    found: list[Answer] = []
    others = [{"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5, "max_new_tokens": 30}, {"repetition_penalty": 2.0}]
    threads = [threading.Thread(target=lambda p=p: SERVICE.answer(["a dog"], p)) for p in others * 4]  # type: ignore[misc]
    threads.append(threading.Thread(target=lambda: found.extend(SERVICE.answer(["the cat"], asked))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.text for answer in found] == [alone.text]


def test_sequences_of_an_input_have_the_seeds_that_follow() -> None:
    asked = {"max_new_tokens": 6, "temperature": 1.5}
    three = SERVICE.answer(["the cat"], {**asked, "seed": 7, "num_return_sequences": 3})
    assert [a.text for a in three] == [SERVICE.answer(["the cat"], {**asked, "seed": s})[0].text for s in (7, 8, 9)]
    assert len({answer.text for answer in three}) > 1


def test_a_text_ends_before_its_stop() -> None:
    [free] = SERVICE.answer(["the cat"], {"max_new_tokens": 12, "seed": 1, "temperature": 1.5})
    word = free.tokens[4]
    [ended] = SERVICE.answer(["the cat"], {"max_new_tokens": 12, "seed": 1, "temperature": 1.5, "stop": word})
    assert ended.finish_reason == "stop"
    assert free.text.startswith(ended.text)
    assert word not in ended.text[len("the cat") :]
    assert len(ended.tokens) <= 5


class Slow(Decoder):
    def hidden(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return super().hidden(*args, **kwargs)


class Broken(Decoder):
    """Fails for a text that ends in one word."""

    def hidden(self, ids_BT: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if (ids_BT == VOCAB.encode("mat")[0]).any():
            raise ZeroDivisionError("mat")
        return super().hidden(ids_BT, *args, **kwargs)


@pytest.mark.parametrize("prompt", ["the cat", "the cat sat on the mat . a"])
def test_generation_stops_at_the_deadline_and_says_so(prompt: str) -> None:
    hasty = new(Limits(deadline_seconds=1.0), Slow)
    with pytest.raises(DeadlineError, match=r"an answer must be made in 1 s: got \d+ of 100 tokens. Try fewer"):
        hasty.answer([prompt], {"max_new_tokens": 100})
    [part] = hasty.answer([prompt], {"max_new_tokens": 100, "return": "full"})
    assert part.finish_reason == "deadline"
    assert 1 <= len(part.tokens) <= 20
    with pytest.raises(DeadlineError):
        list(hasty.stream(prompt, {"max_new_tokens": 100}))
    assert hasty.answer([prompt], {"max_new_tokens": 1})[0].finish_reason == "length"


def test_calls_that_wait_past_their_deadline_are_told_in_time() -> None:
    hasty, began, late = new(Limits(deadline_seconds=1.0), Slow), time.monotonic(), list[float]()

    def ask() -> None:
        with pytest.raises(DeadlineError):
            hasty.answer(["the cat"] * 60, {"max_new_tokens": 500})
        late.append(time.monotonic() - began)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    quick = hasty.answer(["a dog"], {"max_new_tokens": 1, "return": "full"})
    for thread in threads:
        thread.join()
    assert max(late) < 5
    assert quick[0].finish_reason in ("length", "deadline")


def test_a_short_call_has_its_turn_before_a_long_one_ends() -> None:
    fair, ended = new(Limits(deadline_seconds=50), Slow), list[str]()

    def ask(name: str, n: int, tokens: int) -> None:
        fair.answer(["the cat"] * n, {"max_new_tokens": tokens})
        ended.append(name)

    hog = threading.Thread(target=ask, args=("hog", 40, 70))
    hog.start()
    time.sleep(0.3)
    ask("short", 1, 1)
    hog.join()
    assert ended == ["short", "hog"]


def test_an_error_is_of_the_calls_alone_that_have_it() -> None:
    broken, found = new(model=Broken), list[str]()

    def ask(text: str) -> None:
        try:
            broken.answer([text], {"max_new_tokens": 40, "temperature": 0.0})
            found.append("answered")
        except ZeroDivisionError:
            found.append("failed")

    texts = ["the mat", *["a dog"] * 6]
    alone = [Service(broken.model, VOCAB) for _ in texts]
    expected: list[str] = []
    for one, text in zip(alone, texts, strict=True):
        try:
            one.answer([text], {"max_new_tokens": 40, "temperature": 0.0})
            expected.append("answered")
        except ZeroDivisionError:
            expected.append("failed")
    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert expected[0] == "failed"
    assert sorted(found) == sorted(expected)


def test_a_stream_holds_back_what_may_be_a_stop() -> None:
    asked = {"max_new_tokens": 12, "seed": 1, "temperature": 1.5}
    [free] = SERVICE.answer(["the cat"], asked)
    stop = f"{free.tokens[3]} {free.tokens[4]}"
    [ended] = SERVICE.answer(["the cat"], {**asked, "stop": stop})
    assert ended.finish_reason == "stop"
    assert "the cat" + "".join(SERVICE.stream("the cat", {**asked, "stop": stop})) == ended.text
    assert "the cat" + "".join(SERVICE.stream("the cat", asked)) == free.text


def test_long_prompts_are_not_read_with_short_ones_token_by_token() -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(d_model=16, n_layers=1, n_heads=2, d_ff=32, seq_len=64), len(VOCAB)).eval()
    seen: list[tuple[int, ...]] = []
    model.embedding.register_forward_hook(lambda _module, args, _output: seen.append(tuple(args[0].shape)))
    prompts = [generate.Prompt([1] * n, 2, seed=0) for n in (3, 60, 4, 58)]
    together = [token.id for token in sorted(generate.generate_ids(model, prompts), key=lambda token: token.text)]
    assert seen == [(2, 3), (2, 1), (1, 1), (2, 58), (2, 1), (1, 1), (1, 1)]
    alone = [token.id for prompt in prompts for token in generate.generate_ids(model, [prompt])]
    assert together == alone


def test_limits_come_from_the_environment() -> None:
    found = service.limits_of({"LM_SERVE_INPUTS": "3", "LM_SERVE_DEADLINE_SECONDS": "1.5", "LM_SERVE_WAITING": ""})
    assert (found.inputs, found.deadline_seconds, found.waiting) == (3, 1.5, Limits().waiting)
    for setting, rule in (
        ({"LM_SERVE_INPUTS": "-1"}, "LM_SERVE_INPUTS must be a whole number above 0: got '-1'. Try 64."),
        ({"LM_SERVE_INPUTS": "1e3"}, "LM_SERVE_INPUTS must be a whole number above 0: got '1e3'"),
        ({"LM_SERVE_DEADLINE_SECONDS": "inf"}, "LM_SERVE_DEADLINE_SECONDS must be a number above 0: got 'inf'"),
        ({"LM_SERVE_DEADLINE_SECONDS": "70"}, "LM_SERVE_DEADLINE_SECONDS must be below the server's 60 s"),
    ):
        with pytest.raises(UserError, match=rule):
            service.limits_of(setting)


def test_candidates_are_the_likeliest_tokens() -> None:
    found = SERVICE.candidates("the cat", 3)
    assert len(found) == 3
    assert found[0][1] >= found[1][1] >= found[2][1] > 0
