"""Text to records: where a corpus comes from and how it is split. The only place that imports `datasets`.

A corpus is a list of records (question and answer joined) for each split. Splits are the corpus's own, or dealt by
question; a question on two sides is refused. Knows neither tokens nor models.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import importlib.util
import io
import random
import re
import socket
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple, cast
from urllib.parse import urlsplit

from lm.config import DataConfig
from lm.errors import UserError

SPLITS = ("train", "validation", "test")
WIKIQA = "microsoft/wiki_qa"
WIKIQA_RECORDS = {"train": 20_360, "validation": 2_733, "test": 6_165}
_RELEASE_NAMES = {"train": "train", "validation": "dev", "test": "test"}
_HUB_SECONDS = 2.0


class Record(NamedTuple):
    """One question with one answer: the joined text, the answer alone, and what must stay on one side of a split."""

    key: str
    text: str
    answer: str


Records = dict[str, list[Record]]


@dataclass(frozen=True)
class Corpus:
    """The records of each split, with a digest of every one of them."""

    name: str
    source: str
    splits: Records
    digest: str

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
    name = config.corpus
    why_sample = ""
    found: tuple[str, Records] | None = None
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
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.name.split(".")[0]) or "file"
    for split in SPLITS:
        if not splits[split] and not (split == "test" and config.test_fraction == 0):
            raise UserError(
                f"corpus must have records in each split: got none in {split} of {source}. "
                "Try a larger corpus, or other --validation-fraction and --test-fraction."
            )
    _require_apart(splits, source)
    return Corpus(name, source, splits, _digest(splits))


def _require_apart(splits: Records, source: str) -> None:
    """Refuse a split that has trained on what it is measured by: equal questions (keys) on two sides."""
    keys = {split: {record.key for record in splits[split]} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        both = keys[one] & keys[other]
        if both:
            raise UserError(
                f"a question must be on one side of the split: got {len(both):,} of {other} that stand in {one} too, "
                f"in {source}. Try one file without splits of its own, which is split by question."
            )


def _digest(splits: Records) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for record in splits[split]:
            digest.update(f"{split}\t{record.text}\n".encode())
    return digest.hexdigest()


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _record(question: Any, answer: Any, key: str | None = None) -> Record:
    """A record whose key is its question, unless another is given."""
    return Record(key or _spaced(str(question)).lower(), _spaced(f"{question} {answer}"), _spaced(str(answer)))


def _split_by_key(records: Sequence[Record], config: DataConfig) -> Records:
    """Deal records to splits by their key, so that no key is on two sides; each split keeps the corpus's order."""
    keys = sorted({record.key for record in records})
    random.Random(config.split_seed).shuffle(keys)
    n_validation = max(1, round(len(keys) * config.validation_fraction)) if keys else 0
    n_test = round(len(keys) * config.test_fraction)
    side = dict.fromkeys(keys, "train")
    side.update(dict.fromkeys(keys[:n_validation], "validation"))
    side.update(dict.fromkeys(keys[n_validation : n_validation + n_test], "test"))
    splits: Records = {s: [] for s in SPLITS}
    for record in records:
        splits[side[record.key]].append(record)
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
    return [_record(question, answer, key(question)) for question, answer in pairs]


def _read_table(kind: str, files: dict[str, str] | str, cache_dir: Path, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the error that is raised
    return datasets.load_dataset(kind, data_files=files, cache_dir=str(cache_dir / "datasets"), **options)


def _read_csv(files: dict[str, Path], cache_dir: Path, separator: str) -> Any:
    """Every column as text. Tab-separated files have no quoting, comma-separated ones double quotes."""
    import datasets

    quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    first = next(iter(files.values()))
    with _open(first) as f, io.TextIOWrapper(f, encoding="utf-8-sig") as text:
        header = next(csv.reader(text, delimiter=separator, quoting=quoting), [])
    features = datasets.Features({column: datasets.Value("string") for column in header})
    names = {split: str(path) for split, path in files.items()}
    options = {"sep": separator, "quoting": quoting, "keep_default_na": False, "features": features}
    options["index_col"] = False  # rows longer than the header are an error, not a shift of columns
    options["encoding"] = "utf-8-sig"  # as Excel writes it; the mark is optional
    return _read_table("csv", names, cache_dir, **options)


def _file_records(path: Path, config: DataConfig, cache_dir: Path) -> list[Record]:
    """Records of one file: question and answer columns of a table, or the paragraphs of a plain text."""
    try:
        path = path.expanduser()
        found = path.is_file()
    except (OSError, RuntimeError):  # a name too long, a home that is nobody's
        found = False
    if not found:
        raise UserError(
            f"corpus must be wikiqa, sample, auto or an existing file: got {config.corpus}. Try --corpus sample."
        )
    suffixes = [s for s in path.suffixes if s != ".gz"]
    suffix = suffixes[-1].lower() if suffixes else ""
    if path.stat().st_size == 0:
        raise UserError(f"corpus must hold text: got the empty file {path}. Try --corpus sample.")
    if suffix != ".parquet":
        _require_text(path)
    if suffix not in (".csv", ".tsv", ".jsonl", ".json", ".parquet"):
        with _open(path) as f:
            text = f.read().decode("utf-8")
        parts = text.split("\n\n") if "\n\n" in text.strip() else text.splitlines()
        records = [Record(r.lower(), r, r) for r in map(_spaced, parts) if r]
        if not records:
            raise UserError(f"corpus must hold text: got only white space in {path}. Try --corpus sample.")
        return records
    kind = {".tsv": "csv", ".jsonl": "json"}.get(suffix, suffix[1:])
    try:
        if kind == "csv":
            table = _read_csv({"train": path}, cache_dir, "," if suffix == ".csv" else "\t")["train"]
        else:
            table = _read_table(kind, str(path), cache_dir, split="train")
    except OSError:
        raise
    except Exception as e:
        if "corresponds to no data" in str(e):  # a header without rows
            raise UserError(f"corpus must have at least one record: got none in {path}. Try --corpus sample.") from e
        cause = str(e.__cause__ or e).splitlines()[0][:150]
        raise UserError(f"corpus must be readable as {suffix[1:]}: got {path} ({cause}). Try a plain .txt file.") from e
    question, answer = config.question_column, config.answer_column
    for flag, column in (("question", question), ("answer", answer)):
        if column not in table.column_names:
            raise UserError(
                f"{flag}_column must be a column of {path.name}: got {column!r}, "
                f"the file has {', '.join(table.column_names)}. Try --{flag}-column {table.column_names[0]}."
            )
    rows = zip(table[question], table[answer], strict=True)
    records = [_record(q, a) for q, a in rows if q is not None and a is not None]
    records = [record for record in records if record.text]
    if not records:
        raise UserError(f"corpus must have at least one record: got none in {path}. Try --corpus sample.")
    return records


def _open(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked if its name ends in .gz."""
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _require_text(path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with _open(path) as f:
            while chunk := f.read(1 << 20):
                if "\0" in decoder.decode(chunk):
                    raise UserError(f"corpus must be UTF-8 text: got {path} (it holds NUL). Try a .txt or .csv file.")
        decoder.decode(b"", final=True)
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as e:
        raise UserError(
            f"corpus must be UTF-8 text: got {path} ({type(e).__name__}). Try converting it with iconv."
        ) from e


def _wikiqa_release(folder: Path, cache_dir: Path) -> tuple[str, Records]:
    """The release's files: WikiQA-train.tsv and its like, packed or not, or the hub's parquet files."""
    if not folder.is_dir():
        raise UserError(f"LM_WIKIQA_DIR must be a folder: got {folder}. Try --corpus sample.")
    files: dict[str, str] = {}
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
        files[split] = str(found)
    if files["train"].endswith(".parquet"):
        table = _read_table("parquet", files, cache_dir)
        return f"the release in {folder}", _wikiqa_records(table, "question", "answer")
    table = _read_csv({s: Path(f) for s, f in files.items()}, cache_dir, "\t")
    return f"the release in {folder}", _wikiqa_records(table, "Question", "Sentence")


def _wikiqa_hub(revision: str) -> tuple[str, Records]:
    """The hub's copy, or the local cache of it; the source names the commit that the files came from."""
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(WIKIQA, revision=revision)
    except Exception as e:
        raise UserError(
            f"corpus wikiqa must be in LM_WIKIQA_DIR, in the local cache or on the hub: got {type(e).__name__} "
            f"from the hub. Try --corpus sample."
        ) from e
    files = " ".join(cast(Any, table)["train"].info.download_checksums or {})
    commit = re.search(r"@([0-9a-f]{40})", files)
    return f"hub {WIKIQA}@{commit.group(1) if commit else revision}", _wikiqa_records(table, "question", "answer")


def _wikiqa_records(table: Any, question: str, answer: str) -> Records:
    splits = {s: [_record(q, a) for q, a in zip(table[s][question], table[s][answer], strict=True)] for s in SPLITS}
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
