from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.scores import Sheet, Side, compare
from lm.errors import UserError

N_RECORDS, LENGTH = 72, 10


def sheet(shift: float = 0.0, noise: int = 0, seed: int = 0, tokens: str = "t", corpus: str = "c") -> Sheet:
    """Records of ten tokens, three a question; the difficulty of a token is shared by all sheets."""
    difficulty = np.random.default_rng(7).exponential(4, N_RECORDS * LENGTH - 1)
    own = np.random.default_rng(noise).normal(0, 0.5, len(difficulty))
    records = {
        "tokens": np.full(N_RECORDS, LENGTH), "bytes": np.full(N_RECORDS, 50),
        "written_nats": np.full(N_RECORDS, 2.0), "group": np.arange(N_RECORDS) // 3,
        "copied": np.arange(N_RECORDS) % 5 == 0, "shared": np.zeros(N_RECORDS, bool),
    }  # fmt: skip
    return Sheet((difficulty + own + shift).astype(np.float32), records, tokens, corpus, seed, 2, first_nats=3.0)


def test_a_sheet_comes_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "s.safetensors").write_bytes(sheet(seed=3).pack())
    read = Sheet.read(tmp_path / "s.safetensors")
    assert np.array_equal(read.nats, sheet().nats)
    assert (read.tokens_digest, read.corpus_digest, read.seed, read.epoch) == ("t", "c", 3, 2)
    assert all(np.array_equal(read.records[name], column) for name, column in sheet().records.items())


def test_a_damaged_sheet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.safetensors").write_bytes(sheet().pack()[:200])
    with pytest.raises(UserError, match="a score sheet must be as it was written"):
        Sheet.read(tmp_path / "s.safetensors")


@pytest.mark.parametrize("damage", ["short nats", "short column", "nan"])
def test_a_sheet_whose_parts_do_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    made = sheet()
    if damage == "short column":
        made.records["copied"] = made.records["copied"][:-1]
    else:
        made = replace(made, nats=made.nats[:-1] if damage == "short nats" else np.full_like(made.nats, np.nan))
    (tmp_path / "s.safetensors").write_bytes(made.pack())
    with pytest.raises(UserError, match="a score sheet must be as it was written: got ValueError"):
        Sheet.read(tmp_path / "s.safetensors")


def test_a_sheet_with_a_changed_number_is_refused(tmp_path: Path) -> None:
    packed = bytearray(sheet().pack())
    packed[-1] ^= 1
    (tmp_path / "s.safetensors").write_bytes(packed)
    with pytest.raises(UserError, match="a score sheet must be as it was written: got ValueError"):
        Sheet.read(tmp_path / "s.safetensors")


def test_a_question_without_tokens_is_not_counted() -> None:
    made = [sheet(noise=1), sheet(-0.2, noise=2)]
    for one in made:
        one.records["tokens"] = np.concatenate([one.records["tokens"], [0]])
        for name, value in (("bytes", 1), ("written_nats", 0.0), ("group", 99), ("copied", False), ("shared", False)):
            one.records[name] = np.concatenate([one.records[name], [value]])
    assert compare(Side("a", [made[0]]), Side("b", [made[1]])).n_questions == 24


def test_the_nats_of_records_sum_to_those_of_the_tokens() -> None:
    per_record = sheet().per_record()
    assert per_record.sum() == pytest.approx(sheet().nats.sum(dtype=float))
    assert per_record[0] == pytest.approx(sheet().nats[:9].sum(dtype=float), rel=1e-6)
    assert per_record[1] == pytest.approx(sheet().nats[9:19].sum(dtype=float), rel=1e-6)


def test_a_shift_is_found_real_and_noise_is_not() -> None:
    a = Side("a", [sheet(noise=1)])
    real = compare(a, Side("b", [sheet(-0.2, noise=2)]))
    assert real.is_shown
    assert not real.is_real  # one seed a side tells nothing of the configurations
    assert real.low < 0.2 < real.high
    assert real.unit == "token"
    assert (real.n_questions, real.n_targets) == (24, 719)
    same = compare(a, Side("b", [sheet(0.0, noise=4)]))
    assert not same.is_shown
    assert same.low < 0 < same.high


def test_few_or_unequal_questions_show_nothing() -> None:
    few = [sheet(noise=1), sheet(-1.0, noise=2)]
    for made in few:
        made.records["group"][:] = np.minimum(made.records["group"], 15)
    found = compare(Side("a", [few[0]]), Side("b", [few[1]]))
    assert found.low > 0
    assert found.n_questions == 16
    assert found.n_effective < 16
    assert not found.is_shown


def test_swapping_the_sides_turns_the_sign() -> None:
    a, b = Side("a", [sheet(noise=1)]), Side("b", [sheet(-0.2, noise=2)])
    there, back = compare(a, b), compare(b, a)
    assert there.less == pytest.approx(-back.less)
    assert (there.low, there.high) == (pytest.approx(-back.high), pytest.approx(-back.low))


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for i in range(100):
        found = compare(Side("a", [sheet(noise=10 + 2 * i)]), Side("b", [sheet(-0.05, noise=11 + 2 * i)]))
        held += found.low < 0.05 < found.high
    assert 85 <= held <= 100


def test_clean_records_are_counted_alone() -> None:
    a, b = Side("a", [sheet(noise=1)]), Side("b", [sheet(noise=2)])
    assert compare(a, b, clean=True).n_targets == 57 * LENGTH
    dirty = sheet()
    dirty.records["copied"][:] = True
    with pytest.raises(UserError, match="got no clean one"):
        compare(Side("a", [dirty]), b, clean=True)


def test_seeds_that_disagree_are_no_difference() -> None:
    a = Side("a", [sheet(shift, noise=i, seed=i) for i, shift in enumerate((0.0, 0.5, -0.5))])
    b = Side("b", [sheet(shift, noise=9 + i, seed=i) for i, shift in enumerate((-0.6, 0.2, -0.1))])
    found = compare(a, b)
    assert found.has_seeds
    assert found.p > 0.05
    assert not found.is_real
    steady = Side("c", [sheet(shift - 0.3, noise=19 + i, seed=i) for i, shift in enumerate((0.0, 0.5, -0.5))])
    assert compare(a, steady).is_real
    other_seeds = Side("d", [sheet(shift - 0.3, noise=29 + i, seed=7 + i) for i, shift in enumerate((0.0, 0.5, -0.5))])
    assert not compare(a, other_seeds).is_real  # unpaired, the seeds spread wider than the difference


def test_two_vocabularies_are_compared_by_the_byte_with_written_forms_paid() -> None:
    found = compare(Side("a", [sheet()]), Side("b", [sheet(tokens="other")]))
    assert found.unit == "byte"
    assert found.a == found.b
    assert found.a[0] == pytest.approx((sheet().nats.sum(dtype=float) + 3 + 144) / 3600)


def test_two_texts_are_not_compared() -> None:
    with pytest.raises(UserError, match="runs must be measured on the same text"):
        compare(Side("a", [sheet()]), Side("b", [sheet(corpus="other")]))
