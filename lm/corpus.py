"""Text to records: where a corpus comes from and how it is split. Knows neither tokens nor models.

A corpus is records (question and answer joined, or a text) for each split. Splits are the corpus's own, or dealt by
question; none is on two sides. Small corpora are lists in memory. The hub's sets, folders, patterns of files and what
is read by `--text-column` stay on disk, and may be larger than memory.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import importlib.util
import json
import random
import re
import socket
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from gzip import BadGzipFile
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from lm.config import DataConfig
from lm.errors import UserError
from lm.tables import (
    SUFFIXES,
    Record,
    Records,
    TableRecords,
    kind_of,
    made_once,
    number,
    open_bytes,
    read_files,
    read_hub,
    record,
    require_columns,
    scan,
    spaced,
)

SPLITS = ("train", "validation", "test")
WIKIQA = "microsoft/wiki_qa"
WIKIQA_RECORDS = {"train": 20_360, "validation": 2_733, "test": 6_165}
_RELEASE_NAMES = {"train": "train", "validation": "dev", "test": "test"}
_HUB_SECONDS = 2.0
_OWN_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_ROWS_FORMAT = 1
_NAMED = ("wikiqa", "sample", "auto")

Lists = dict[str, list[Record]]


@dataclass(frozen=True)
class Corpus:
    """The records of each split, with a digest of every one of them.

    `keys_digest` is one of questions and answers apart, where they are too many to be looked at again.
    """

    name: str
    source: str
    splits: Mapping[str, Records]
    digest: str
    keys_digest: str = ""

    def describe(self) -> str:
        """One line: name, size of each split, digest, source."""
        sizes = ", ".join(f"{len(self.splits[s]):,} {s}" for s in SPLITS)
        return f"corpus {self.name}: {sizes} records, digest {self.digest[:8]}, from {self.source}"


def load_corpus(
    config: DataConfig, cache_dir: Path, wikiqa_dir: Path | None = None, wikiqa_revision: str = "main"
) -> Corpus:
    """Read the corpus that `config.corpus` names.

    Args:
        config: which text, and how to split one that has no splits of its own.
        cache_dir: where `datasets` keeps what it has parsed.
        wikiqa_dir: folder of the WikiQA release (.tsv, .tsv.gz or .parquet), if there is one.
        wikiqa_revision: branch, tag or commit of the hub's copy; a commit is what the source then names.

    Raises:
        UserError: no such corpus, a missing column, a file that is not text, a split without records, a question on
            two sides of the split.
    """
    if config.text_column and config.corpus in _NAMED:
        raise UserError(
            f"text_column is for files and the hub's sets: got --corpus {config.corpus}. Try --corpus 'folder/*.jsonl'."
        )
    if _stays_on_disk(config):
        return _on_disk(config, cache_dir)
    name = config.corpus
    why_sample = ""
    found: tuple[str, Lists] | None = None
    if name == "auto":
        name = "wikiqa" if wikiqa_dir else "sample"
        if not wikiqa_dir and (_wikiqa_cached() or _hub_reachable()):
            try:
                name, found = "wikiqa", _wikiqa_hub(wikiqa_revision)
            except UserError as e:
                name, why_sample = "sample", f"; {e}"
    if found:
        source, splits = found
    elif name == "wikiqa":
        source, splits = _wikiqa_release(wikiqa_dir, cache_dir) if wikiqa_dir else _wikiqa_hub(wikiqa_revision)
    elif name == "sample":
        source, splits = (
            f"the package chatterbot-corpus (English){why_sample}",
            _split_by_key(_sample_records(), config),
        )
    else:
        path = Path(name)
        source, splits = str(path), _split_by_key(_file_records(path, config, cache_dir), config)
        name = _name(path.name)
    _require_records(splits, config, source)
    _require_apart(splits, source)
    return Corpus(name, source, splits, _digest(splits))


def _name(file: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", file.split(".")[0]).strip("-") or "file"


def _require_records(splits: Mapping[str, Records], config: DataConfig, source: str) -> None:
    for split in SPLITS:
        if not len(splits[split]) and not (split == "test" and config.test_fraction == 0):
            raise UserError(
                f"corpus must have records in each split: got none in {split} of {source}. "
                "Try a larger corpus, or other --validation-fraction and --test-fraction."
            )


def _require_apart(splits: Lists, source: str) -> None:
    """Refuse a split that has trained on what it is measured by: equal questions (keys) on two sides."""
    keys = {split: {each.key for each in splits[split]} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        both = keys[one] & keys[other]
        if both:
            raise UserError(
                f"a question must be on one side of the split: got {len(both):,} of {other} that stand in {one} too, "
                f"in {source}. Try one file without splits of its own, which is split by question."
            )


def _digest(splits: Lists) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for each in splits[split]:
            digest.update(f"{split}\t{each.text}\n".encode())
    return digest.hexdigest()


def _split_by_key(records: Sequence[Record], config: DataConfig) -> Lists:
    """Deal records to splits by their key, so that no key is on two sides; each split keeps the corpus's order."""
    keys = sorted({record.key for record in records})
    random.Random(config.split_seed).shuffle(keys)
    n_validation = max(1, round(len(keys) * config.validation_fraction)) if keys else 0
    n_test = round(len(keys) * config.test_fraction)
    side = dict.fromkeys(keys, "train")
    side.update(dict.fromkeys(keys[:n_validation], "validation"))
    side.update(dict.fromkeys(keys[n_validation : n_validation + n_test], "test"))
    splits: Lists = {s: [] for s in SPLITS}
    for each in records:
        splits[side[each.key]].append(each)
    return splits


def _sample_records() -> list[Record]:
    """Consecutive turns of the conversations in chatterbot-corpus; entries that are not text are left out.

    A middle turn is an answer and a question, and some turns stand in many conversations. So conversations that
    share a turn have one key, and no sentence is on two sides of the split.
    """
    import yaml

    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or spec.origin is None:
        raise UserError(
            "corpus sample must have its package: got no chatterbot-corpus. Try pip install chatterbot-corpus."
        )
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    folder = Path(spec.origin).parent / "data" / "english"
    pairs: list[tuple[str, str]] = []
    parent: dict[str, str] = {}  # a turn to another one of its conversations, up to the one that names them all

    def key(turn: str) -> str:
        turn = " ".join(turn.lower().split())
        while (above := parent.setdefault(turn, turn)) != turn:
            turn = above
        return turn

    for file in sorted(folder.glob("*.yml")):
        for turns in yaml.load(file.read_text(encoding="utf-8"), loader)["conversations"]:
            for question, answer in pairwise(turns):
                if isinstance(question, str) and isinstance(answer, str):
                    parent[key(answer)] = key(question)
                    pairs.append((question, answer))
    return [record(question, answer, key(question)) for question, answer in pairs]


def _stays_on_disk(config: DataConfig) -> bool:
    name = config.corpus
    return (
        name.startswith("hf:")
        or bool(config.text_column)
        or (name not in _NAMED and (bool(re.search(r"[*?\[]", name)) or _is("dir", name)))
    )


def _is(kind: str, name: str) -> bool:
    """Whether a name is a file's, or a folder's (`dir`)."""
    try:
        path = Path(name).expanduser()
        return path.is_dir() if kind == "dir" else path.is_file()
    except (OSError, RuntimeError):  # a name too long, a home that is nobody's
        return False


def _on_disk(config: DataConfig, cache_dir: Path) -> Corpus:
    """A corpus whose records are read from tables on disk."""
    if config.corpus.startswith("hf:"):
        name, _, revision = config.corpus.removeprefix("hf:").partition("@")
        name, _, part = name.partition(":")
        found = read_hub(name, part or None, revision or None)
        source = f"hub {name}{f' ({part})' if part else ''}@{_commit(found) or revision or 'main'}"
        columns = _columns(config)
    else:
        files = _files(config.corpus)
        found = read_files({"train": files}, cache_dir)
        name, source = (
            Path(config.corpus).name,
            f"{config.corpus} ({len(files)} files)" if len(files) > 1 else str(files[0]),
        )
        columns = (
            {"text_column": "text"} if kind_of(files[0]) == ".txt" and not config.text_column else _columns(config)
        )
    tables = {split: found[own] for split in SPLITS for own in _OWN_NAMES[split] if own in found}
    if "train" not in tables:
        raise UserError(f"corpus must have a split train: got {', '.join(found)} in {source}. Try another set or part.")
    for table in tables.values():
        require_columns(table, columns, source)
    rows, about = _rows(tables, tuple(columns.values()), config, cache_dir)
    splits = {s: TableRecords(tables.get(s, tables["train"]), tuple(columns.values()), rows[s]) for s in SPLITS}
    if about["left_out"]:
        source += (
            f" without {about['left_out']:,} records whose {'question' if len(columns) > 1 else 'text'} is held out"
        )
    _require_records(splits, config, source)
    return Corpus(_name(name.replace("/", "-")), source, splits, about["digest"], about["keys_digest"])


def _columns(config: DataConfig) -> dict[str, str]:
    if config.text_column:
        return {"text_column": config.text_column}
    return {"question_column": config.question_column, "answer_column": config.answer_column}


def _files(corpus: str) -> list[Path]:
    """The files of a path, a folder or a pattern, in the order of their names."""
    path = Path(corpus).expanduser()
    if _is("dir", corpus):
        files = sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file) in SUFFIXES)
    elif _is("file", corpus):
        files = [path]
    else:
        files = sorted(Path(file) for file in glob.glob(str(path)) if _is("file", file))  # noqa: PTH207 (any pattern)
    if not files or {kind_of(file) for file in files} - set(SUFFIXES) or len({kind_of(file) for file in files}) > 1:
        got = ", ".join(sorted({kind_of(file) or file.name for file in files})) or "none"
        raise UserError(
            f"corpus must name files of one kind ({', '.join(SUFFIXES)}; .gz too): got {got} for {corpus}. "
            "Try --corpus 'folder/*.jsonl'."
        )
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"corpus must hold text: got the empty file {file}. Try --corpus sample.")
    return files


def _rows(
    tables: Mapping[str, Any], columns: tuple[str, ...], config: DataConfig, cache_dir: Path
) -> tuple[dict[str, npt.NDArray[np.int64]], dict[str, Any]]:
    """Which rows of the tables are whose records, with digests; found once and kept in the cache.

    A split that the tables lack is dealt out of train by its key's number, so equal keys are on one side. Where own
    splits share keys train gives way to both others, and validation to test: those rows are left out.
    """
    prints = {split: table._fingerprint for split, table in tables.items()}
    dealt = [config.validation_fraction, config.test_fraction, config.split_seed]
    settings = json.dumps([_ROWS_FORMAT, prints, columns, dealt], sort_keys=True)
    folder = cache_dir / f"records-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"
    return made_once(folder, _read_rows, lambda draft: _write_rows(draft, tables, columns, config))


def _read_rows(folder: Path) -> tuple[dict[str, npt.NDArray[np.int64]], dict[str, Any]] | None:
    """What `_write_rows` wrote; None where it is not there, or damaged."""
    try:
        rows = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS}
        return rows, json.loads((folder / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError):
        return None


def _write_rows(draft: Path, tables: Mapping[str, Any], columns: tuple[str, ...], config: DataConfig) -> None:
    """Go through all records once; about 120 bytes of memory a record."""
    kind = np.dtype([("row", "i8"), ("key", "u8"), ("text", "u8"), ("answer", "u8")])
    found: dict[str, npt.NDArray[np.void]] = {}
    for split, table in tables.items():
        made = ((i, number(r.key), number(r.text), number(r.answer)) for i, r in scan(table, columns))
        found[split] = np.fromiter(made, kind)
    train = found["train"]
    chance = _mixed(train["key"], config.split_seed)
    edges = {
        "validation": (0.0, config.validation_fraction),
        "test": (config.validation_fraction, config.test_fraction),
    }
    stays = np.ones(len(train), bool)
    for split, (start, width) in edges.items():
        if split not in tables:
            chosen = (chance >= start) & (chance < start + width)
            found[split], stays = train[chosen], stays & ~chosen
    found["train"] = train[stays]
    left_out = 0
    for split, others in (("validation", ["test"]), ("train", ["validation", "test"])):
        shared = np.isin(found[split]["key"], np.concatenate([found[other]["key"] for other in others]))
        left_out += int(shared.sum())
        found[split] = found[split][~shared]
    digests = [hashlib.sha256(), hashlib.sha256()]
    for split in SPLITS:
        np.save(draft / f"{split}.npy", found[split]["row"])
        for digest, fields in zip(digests, (["text"], ["key", "answer"]), strict=True):
            digest.update(split.encode())
            for field in fields:
                digest.update(np.ascontiguousarray(found[split][field]).tobytes())
    about = {"digest": digests[0].hexdigest(), "keys_digest": digests[1].hexdigest(), "left_out": left_out}
    (draft / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _mixed(keys: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each key, another one for each seed (splitmix64: Steele et al. 2014)."""
    z = keys + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return (z ^ (z >> np.uint64(31))) / 2.0**64


def _file_records(path: Path, config: DataConfig, cache_dir: Path) -> list[Record]:
    """Records of one file: question and answer columns of a table, or the paragraphs of a plain text."""
    if not _is("file", str(path)):
        raise UserError(
            f"corpus must be wikiqa, sample, auto or an existing file: got {config.corpus}. Try --corpus sample."
        )
    path = path.expanduser()
    suffix = kind_of(path)
    if path.stat().st_size == 0:
        raise UserError(f"corpus must hold text: got the empty file {path}. Try --corpus sample.")
    if suffix != ".parquet":
        _require_text(path)
    if suffix not in (".csv", ".tsv", ".jsonl", ".json", ".parquet"):
        with open_bytes(path) as f:
            text = f.read().decode("utf-8")
        parts = text.split("\n\n") if "\n\n" in text.strip() else text.splitlines()
        records = [Record(r.lower(), r, r) for r in map(spaced, parts) if r]
        if not records:
            raise UserError(f"corpus must hold text: got only white space in {path}. Try --corpus sample.")
        return records
    table = read_files({"train": [path]}, cache_dir)["train"]
    columns = _columns(config)
    require_columns(table, columns, path.name)
    records = [made for _, made in scan(table, tuple(columns.values()))]
    if not records:
        raise UserError(f"corpus must have at least one record: got none in {path}. Try --corpus sample.")
    return records


def _require_text(path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open_bytes(path) as f:
            while chunk := f.read(1 << 20):
                if "\0" in decoder.decode(chunk):
                    raise UserError(f"corpus must be UTF-8 text: got {path} (it holds NUL). Try a .txt or .csv file.")
        decoder.decode(b"", final=True)
    except (UnicodeDecodeError, BadGzipFile, zlib.error, EOFError) as e:
        raise UserError(
            f"corpus must be UTF-8 text: got {path} ({type(e).__name__}). Try converting it with iconv."
        ) from e


def _wikiqa_release(folder: Path, cache_dir: Path) -> tuple[str, Lists]:
    """The release's files: WikiQA-train.tsv and its like, packed or not, or the hub's parquet files."""
    if not folder.is_dir():
        raise UserError(f"LM_WIKIQA_DIR must be a folder: got {folder}. Try --corpus sample.")
    files: dict[str, list[Path]] = {}
    for split in SPLITS:
        release = _RELEASE_NAMES[split]
        patterns = (
            f"WikiQA-{release}.tsv",
            f"WikiQA-{release}.tsv.gz",
            f"{split}*.parquet",
            f"{release}*.parquet",
        )
        found = next((p for pattern in patterns for p in sorted(folder.glob(pattern))), None)
        if found is None:
            raise UserError(
                f"LM_WIKIQA_DIR must hold each split of the release: got no {patterns[0]} (or .gz, .parquet) in "
                f"{folder}. Try --corpus sample."
            )
        files[split] = [found]
    names = ("question", "answer") if kind_of(files["train"][0]) == ".parquet" else ("Question", "Sentence")
    return f"the release in {folder}", _wikiqa_records(read_files(files, cache_dir), *names)


def _wikiqa_hub(revision: str) -> tuple[str, Lists]:
    """The hub's copy, or the local cache of it; the source names the commit that the files came from."""
    try:
        table = read_hub(WIKIQA, None, revision)
    except UserError as e:
        raise UserError(
            f"corpus wikiqa must be in LM_WIKIQA_DIR, in the local cache or on the hub: got {e.__cause__!r:.150} "
            f"from the hub. Try --corpus sample."
        ) from e
    return f"hub {WIKIQA}@{_commit(table) or revision}", _wikiqa_records(table, "question", "answer")


def _commit(tables: Any) -> str:
    """The commit that the hub's files came from; empty where they do not tell."""
    files = " ".join(next(iter(tables.values())).info.download_checksums or {})
    found = re.search(r"@([0-9a-f]{40})", files)
    return found.group(1) if found else ""


def _wikiqa_records(table: Any, question: str, answer: str) -> Lists:
    splits = {s: [record(q, a) for q, a in zip(table[s][question], table[s][answer], strict=True)] for s in SPLITS}
    sizes = {s: len(splits[s]) for s in SPLITS}
    if sizes != WIKIQA_RECORDS:
        raise UserError(
            f"WikiQA must have {WIKIQA_RECORDS} records: got {sizes}. Try a fresh copy, or --corpus with its file."
        )
    return splits


def _wikiqa_cached() -> bool:
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"datasets--{WIKIQA.replace('/', '--')}" / "snapshots").is_dir()


def _hub_reachable() -> bool:
    """Whether the hub takes a connection; decided within about two seconds, also where names do not resolve."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    reached = threading.Event()

    def connect() -> None:
        url = urlsplit(constants.ENDPOINT)
        try:
            socket.create_connection((url.hostname or "", url.port or 443), timeout=_HUB_SECONDS).close()
        except OSError:
            return
        reached.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    return reached.is_set()
