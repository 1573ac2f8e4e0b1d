import importlib.util
import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lm import corpus as corpus_module
from lm import data
from lm.config import Config, DataConfig
from lm.corpus import SPLITS, Corpus, Record, load_corpus
from lm.errors import UserError
from lm.ngram import KneserNey
from tests.conftest import toy_rows


def write(folder: Path, suffix: str) -> Path:
    file = folder / f"toy{suffix}"
    rows = toy_rows()
    if suffix == ".tsv":
        text = "\n".join(["question\tanswer", *(f'{q}\t"{a}' for q, a in rows)])
    elif suffix == ".csv":
        text = "\n".join(["question,answer", *(f'"{q}","{a}"' for q, a in rows)])
    elif suffix == ".jsonl":
        text = "\n".join(json.dumps({"question": q, "answer": a}) for q, a in rows)
    elif suffix == ".parquet":
        import datasets

        columns = {"question": [q for q, _ in rows], "answer": [a for _, a in rows]}
        datasets.Dataset.from_dict(columns).to_parquet(str(file))
        return file
    else:
        text = "\n".join(f"{q} {a}" for q, a in rows)
    file.write_text(text + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".txt"])
def test_every_kind_of_file_gives_all_records(suffix: str, tmp_path: Path) -> None:
    corpus = load_corpus(DataConfig(corpus=str(write(tmp_path, suffix))), tmp_path / "cache")
    records = [r.text for s in SPLITS for r in corpus.splits[s]]
    quote = '"' if suffix == ".tsv" else ""
    assert sorted(records) == sorted(f"{q} {quote}{a}" for q, a in toy_rows())
    assert corpus.name == "toy"


def test_no_question_is_on_two_sides(toy_csv: Path, tmp_path: Path) -> None:
    corpus = load_corpus(DataConfig(corpus=str(toy_csv)), tmp_path / "cache")
    sides = [{r.text.split("?")[0] for r in corpus.splits[s]} for s in SPLITS]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert [len(s) for s in sides] == [64, 8, 8]


def test_the_split_depends_on_its_seed_alone(toy_csv: Path, tmp_path: Path) -> None:
    config = DataConfig(corpus=str(toy_csv))
    first, again = (load_corpus(config, tmp_path / "cache") for _ in range(2))
    other = load_corpus(replace(config, split_seed=1), tmp_path / "cache")
    assert first.digest == again.digest != other.digest


def test_the_sample_needs_no_network_and_keeps_questions_apart(tmp_path: Path) -> None:
    corpus = load_corpus(DataConfig(corpus="sample"), tmp_path)
    assert sum(len(corpus.splits[s]) for s in SPLITS) == 2393
    assert corpus.name == "sample"
    assert len(corpus.splits["train"]) > 1500


def test_no_sentence_of_the_sample_is_on_two_sides(tmp_path: Path) -> None:
    corpus = load_corpus(DataConfig(corpus="sample"), tmp_path)
    pairs = [(split, record.text) for split in SPLITS for record in corpus.splits[split]]
    sides_of: dict[str, set[str]] = {}
    import yaml

    folder = Path(str(importlib.util.find_spec("chatterbot_corpus").origin)).parent / "data/english"  # type: ignore[union-attr]
    turns = {
        " ".join(turn.lower().split())
        for file in folder.glob("*.yml")
        for conversation in yaml.safe_load(file.read_text())["conversations"]
        for turn in conversation
        if isinstance(turn, str)
    }
    for split, record in pairs:
        text = record.lower()
        for end in range(1, len(text)):
            if text[end] == " " and text[:end] in turns and text[end + 1 :] in turns:
                sides_of.setdefault(text[:end], set()).add(split)
                sides_of.setdefault(text[end + 1 :], set()).add(split)
    assert len(sides_of) > 1000
    assert all(len(sides) == 1 for sides in sides_of.values())


def test_a_file_that_excel_wrote_is_read(tmp_path: Path) -> None:
    file = write(tmp_path, ".csv")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_corpus(DataConfig(corpus=str(file)), tmp_path / "cache").splits["train"]


def test_a_broken_download_of_wikiqa_is_said_and_the_sample_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    (hub / "datasets--microsoft--wiki_qa" / "snapshots").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    corpus = load_corpus(DataConfig(), tmp_path / "cache")
    assert corpus.name == "sample"
    assert "corpus wikiqa must be in LM_WIKIQA_DIR" in corpus.describe()


def test_auto_without_hub_takes_the_sample_in_under_three_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    started = time.perf_counter()
    assert load_corpus(DataConfig(), tmp_path).name == "sample"
    assert time.perf_counter() - started < 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "corpus must hold text: got the empty file"),
        ("blank.txt", b" \n \n", "corpus must hold text: got only white space"),
        ("head.csv", b"question,answer\n", "corpus must have at least one record"),
        (
            "columns.csv",
            b"q,a\nhow?,so\n",
            "question_column must be a column of columns.csv: got 'question', it has",
        ),
        ("picture.txt", b"\x89PNG\r\n\x00\x01", "corpus must be UTF-8 text"),
        ("latin.csv", b"question,answer\nol\xe9?,s\xed\n", "corpus must be UTF-8 text"),
        ("long.csv", b"question,answer\nq,a,zz\nr,b,zz\n", "corpus must be readable as csv"),
        ("half.txt.gz", b"\x1f\x8b\x08\x00half", "corpus must be UTF-8 text"),
        ("broken.jsonl", b'{"question": "how?", "answer":\n', "corpus must be readable as jsonl"),
        ("fake.parquet", b"PAR1 and nothing else", "corpus must be readable as parquet"),
        ("one.csv", b"question,answer\nhow?,so\n", "corpus must have records in each split"),
    ],
)
def test_a_file_that_is_no_corpus_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_corpus(DataConfig(corpus=str(file)), tmp_path / "cache")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an existing file: got nowhere.csv"):
        load_corpus(DataConfig(corpus="nowhere.csv"), tmp_path)


def test_a_release_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"LM_WIKIQA_DIR must hold each split .* no WikiQA-train\.tsv"):
        load_corpus(DataConfig(corpus="wikiqa"), tmp_path, tmp_path)


def test_a_shortened_wikiqa_is_refused(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        text = 'QuestionID\tQuestion\tSentence\nQ1\thow?\tlike "this\n'
        (tmp_path / f"WikiQA-{split}.tsv").write_text(text)
    with pytest.raises(UserError, match="WikiQA must have .*20360.*: got .*'train': 1"):
        load_corpus(DataConfig(corpus="wikiqa"), tmp_path / "cache", tmp_path)


def test_wikiqa_from_nowhere_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="corpus wikiqa must be in LM_WIKIQA_DIR.*Try --corpus sample"):
        load_corpus(DataConfig(corpus="wikiqa"), tmp_path)


@pytest.mark.wikiqa
def test_wikiqa_has_the_published_counts(wikiqa_dir: Path, tmp_path: Path) -> None:
    config = Config().data
    corpus = load_corpus(config, tmp_path, wikiqa_dir)
    tokens = data.tokenize(corpus, config, tmp_path)
    assert corpus.name == "wikiqa"
    copied = {s: round(100 * float(tokens.records[s]["copied"].mean()), 1) for s in ("validation", "test")}
    assert copied == {"validation": 17.8, "test": 13.4}
    assert {s: len(tokens.ids[s]) for s in SPLITS} == {
        "train": 676_485,
        "validation": 89_745,
        "test": 203_612,
    }
    assert len(tokens.vocab) == 18_707
    unknown = {s: np.mean(tokens.ids[s] == tokens.vocab.unk_id) for s in SPLITS}
    assert abs(unknown["validation"] - 0.056) < 0.001
    assert abs(unknown["test"] - 0.062) < 0.001
    single_discount = {2: 243.4, 3: 168.2, 4: 143.5, 5: 137.4}  # one discount an order; three are a little better
    baseline = KneserNey(tokens.ids["train"], len(tokens.vocab))
    for order, figure in single_discount.items():
        ours = float(np.exp(baseline.nats(tokens.ids["validation"], order)[1:].mean()))
        assert 0.96 * figure < ours < figure
    assert float(np.exp(tokens.baseline_nats["validation"].mean(dtype=float))) == pytest.approx(134.42, abs=0.01)


def test_validation_text_put_into_train_is_refused(
    toy_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = corpus_module._split_by_key

    def leaking(records: Sequence[Record], config: DataConfig) -> dict[str, list[Record]]:
        splits = honest(records, config)
        splits["train"] += splits["validation"][:3]
        return splits

    monkeypatch.setattr(corpus_module, "_split_by_key", leaking)
    with pytest.raises(
        UserError, match="a question must be on one side of the split: got 2 of validation that stand in"
    ):
        load_corpus(DataConfig(corpus=str(toy_csv)), tmp_path / "cache")


@pytest.mark.parametrize("name", ["~nobody-at-all/x.csv", "a" * 300 + ".txt"])
def test_a_path_that_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an existing file: got"):
        load_corpus(DataConfig(corpus=name), tmp_path)


def texts(n: int, first: int = 0) -> list[str]:
    return [f"the otter number {i} swims  in river {i % 7}." for i in range(first, first + n)]


def write_jsonl(file: Path, column: str, rows: Sequence[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({column: row}) + "\n" for row in rows), encoding="utf-8")
    return file


def split_texts(corpus: Corpus) -> dict[str, list[str]]:
    return {split: [record.text for record in corpus.splits[split]] for split in SPLITS}


def test_a_text_column_makes_a_corpus_on_disk_split_by_text(tmp_path: Path) -> None:
    rows = [*texts(300), *texts(5), "", "  "]
    write_jsonl(tmp_path / "texts.jsonl", "body", rows)
    config = DataConfig(corpus=str(tmp_path / "texts.jsonl"), text_column="body")
    corpus = load_corpus(config, tmp_path / "cache")
    found = split_texts(corpus)
    assert sorted(text for split in found.values() for text in split) == sorted(" ".join(r.split()) for r in rows[:305])
    assert len({text for split in found.values() for text in split}) == sum(len({*split}) for split in found.values())
    assert 15 < len(found["validation"]) < 50 and 15 < len(found["test"]) < 50
    again, other = (load_corpus(replace(config, split_seed=s), tmp_path / "cache") for s in (0, 1))
    assert corpus.digest == again.digest != other.digest
    assert split_texts(again) == found


def test_folders_and_patterns_of_files_are_one_corpus(tmp_path: Path) -> None:
    for i in range(3):
        write_jsonl(tmp_path / f"parts/part-{i}.jsonl", "text", texts(50, 50 * i))
    config = DataConfig(corpus=str(tmp_path / "parts"), text_column="text")
    folder = load_corpus(config, tmp_path / "cache")
    pattern = load_corpus(replace(config, corpus=str(tmp_path / "parts/part-*.jsonl")), tmp_path / "cache")
    assert split_texts(folder) == split_texts(pattern)
    assert sum(len(records) for records in folder.splits.values()) == 150
    assert "(3 files)" in folder.describe()


def test_plain_lines_of_text_files_need_no_column(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 60)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(texts(60, first)), encoding="utf-8")
    corpus = load_corpus(DataConfig(corpus=str(tmp_path / "*.txt")), tmp_path / "cache")
    assert sum(len(records) for records in corpus.splits.values()) == 120


def test_a_set_of_the_hub_keeps_its_own_splits_and_train_gives_way(tmp_path: Path) -> None:
    """A folder laid out as the hub's sets are, which is read by the same call."""
    write_jsonl(tmp_path / "set/train.jsonl", "text", texts(100))
    write_jsonl(tmp_path / "set/validation.jsonl", "text", [*texts(20, 90), "seen in test."])
    write_jsonl(tmp_path / "set/test.jsonl", "text", [*texts(10, 200), "Seen in  test."])
    corpus = load_corpus(DataConfig(corpus=f"hf:{tmp_path / 'set'}", text_column="text"), tmp_path / "cache")
    found = split_texts(corpus)
    assert [len(found[split]) for split in SPLITS] == [90, 20, 11]
    assert "without 11 records whose text is held out" in corpus.describe()


def test_a_set_without_validation_is_dealt_one_out_of_train(tmp_path: Path) -> None:
    rows = [f'{{"question": "how {i % 50}?", "answer": "so {i}"}}\n' for i in range(200)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text("".join(rows))
    (tmp_path / "set/test.jsonl").write_text('{"question": "why?", "answer": "so"}\n')
    corpus = load_corpus(DataConfig(corpus=f"hf:{tmp_path / 'set'}"), tmp_path / "cache")
    questions = {split: {record.key for record in corpus.splits[split]} for split in SPLITS}
    assert not questions["train"] & questions["validation"] and questions["validation"]
    assert questions["test"] == {"why?"}
    assert sum(len(records) for records in corpus.splits.values()) == 201


@pytest.mark.parametrize(
    ("corpus", "column", "message"),
    [
        ("hf:nobody/nothing", "text", "corpus hf:nobody/nothing must be on the hub or in the local cache: got"),
        ("{folder}/texts.jsonl", "txt", "text_column must be a column of .*: got 'txt', it has body"),
        ("{folder}/none-*.jsonl", "body", r"corpus must name files of one kind .*: got none"),
        ("{folder}", "body", r"corpus must name files of one kind .*: got .csv, .jsonl"),
        ("{folder}/broken.parquet", "body", "corpus must be readable as parquet"),
        ("{folder}/latin.csv", "body", "corpus must be readable as csv: got .*UTF-8"),
        ("{folder}/half.jsonl.gz", "body", "corpus must be readable as jsonl"),
        ("{folder}/**x.jsonl", "body", "corpus must name files of one kind"),
        ("sample", "body", "text_column is for files and the hub's sets: got --corpus sample"),
    ],
)  # fmt: skip
def test_what_is_no_corpus_on_disk_is_refused(corpus: str, column: str, message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data/texts.jsonl", "body", texts(30))
    (tmp_path / "data/other.csv").write_text("body\nx\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "latin.csv").write_bytes(b"body\nol\xe9\n")
    (tmp_path / "half.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00half")
    folder = tmp_path if re.search("broken|latin|half", corpus) else tmp_path / "data"
    with pytest.raises(UserError, match=message) as caught:
        load_corpus(DataConfig(corpus=corpus.format(folder=folder), text_column=column), tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_names_that_look_like_patterns_are_read_as_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "parts/part[1].jsonl", "text", texts(60))
    corpus = load_corpus(DataConfig(corpus=str(tmp_path / "parts"), text_column="text"), tmp_path / "cache")
    assert sum(len(records) for records in corpus.splits.values()) == 60


def test_a_damaged_cache_of_rows_is_made_again(tmp_path: Path) -> None:
    config = DataConfig(corpus=str(write_jsonl(tmp_path / "t.jsonl", "text", texts(60))), text_column="text")
    first = split_texts(load_corpus(config, tmp_path / "cache"))
    [rows] = (tmp_path / "cache").glob("records-*/train.npy")
    rows.write_bytes(rows.read_bytes()[:130])
    assert split_texts(load_corpus(config, tmp_path / "cache")) == first


def test_a_text_column_is_advised_where_there_is_neither_question_nor_answer(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "parts/a.jsonl", "body", texts(9))
    with pytest.raises(UserError, match="question_column must be a column of .*Try --text-column body"):
        load_corpus(DataConfig(corpus=str(tmp_path / "parts")), tmp_path / "cache")
