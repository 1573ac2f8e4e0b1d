"""Files and the hub's sets as tables, and records read from a table on disk. The only place that imports `datasets`.

`datasets` parses each source once, into Arrow files that are mapped into memory and read a few rows at a time. So a
corpus may be larger than memory.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from lm.errors import UserError

T = TypeVar("T")

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
_ROWS = 1000


class Record(NamedTuple):
    """One question with one answer: the joined text, the answer alone, and what must stay on one side of a split."""

    key: str
    text: str
    answer: str


class Records(Protocol):
    """Records in an order, in memory or on disk, that can be gone through as often as needed."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Record]: ...


def spaced(text: str) -> str:
    """The same words with single spaces."""
    return " ".join(text.split())


def record(question: Any, answer: Any, key: str | None = None) -> Record:
    """A record whose key is its question, unless another is given."""
    return Record(key or spaced(str(question)).lower(), spaced(f"{question} {answer}"), spaced(str(answer)))


@dataclass(frozen=True)
class TableRecords:
    """Records of some rows of a table on disk: of a text column, or of question and answer."""

    table: Any
    columns: tuple[str, ...]
    rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Record]:
        for _, made in scan(self.table.select(self.rows), self.columns):
            yield made


def scan(table: Any, columns: Sequence[str]) -> Iterator[tuple[int, Record]]:
    """Each row that has text, by its number, as a record."""
    table = table.select_columns(list(columns))
    for start in range(0, len(table), _ROWS):
        batch = table[start : start + _ROWS]
        for i, values in enumerate(zip(*(batch[column] for column in columns), strict=True)):
            if any(value is None for value in values):
                continue
            if len(values) == 1:
                text = spaced(str(values[0]))
                made = Record(text.lower(), text, text)
            else:
                made = record(*values)
            if made.text:
                yield start + i, made


def number(text: str) -> int:
    """64 bits of a text, equal for equal texts alone (but for one chance in 2 ** 64 a pair)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def open_bytes(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked if its name ends in .gz."""
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def kind_of(path: Path) -> str:
    """The suffix that tells how a file is read, without .gz; empty for none."""
    suffixes = [s for s in path.suffixes if s != ".gz"]
    return suffixes[-1].lower() if suffixes else ""


def read_files(files: Mapping[str, Sequence[Path]], cache_dir: Path) -> Any:
    """Tables of files by split, all of one kind; every column of csv and tsv is text.

    Tab-separated files have no quoting, comma-separated ones double quotes.

    Raises:
        UserError: they cannot be read as what their names say; the cause is in the message.
    """
    first = next(iter(files.values()))[0]
    suffix = kind_of(first)
    names = {split: [glob.escape(str(path)) for path in paths] for split, paths in files.items()}
    options: dict[str, Any] = {}
    builder = {".tsv": "csv", ".jsonl": "json", ".txt": "text"}.get(suffix, suffix[1:])
    try:
        if suffix in (".csv", ".tsv"):
            separator = "," if suffix == ".csv" else "\t"
            quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
            with open_bytes(first) as f, io.TextIOWrapper(f, encoding="utf-8-sig") as text:
                header = next(csv.reader(text, delimiter=separator, quoting=quoting), [])
            options = {"sep": separator, "quoting": quoting, "keep_default_na": False}
            options["features"] = _datasets().Features({column: _datasets().Value("string") for column in header})
            options["index_col"] = False  # rows longer than the header are an error, not a shift of columns
            options["encoding"] = "utf-8-sig"  # as Excel writes it; the mark is optional
        return _datasets().load_dataset(builder, data_files=names, cache_dir=str(cache_dir / "datasets"), **options)
    except Exception as e:  # the parsers' errors have no common base
        if isinstance(e, OSError) and e.errno is not None:
            raise
        if "corresponds to no data" in str(e):  # a header without rows
            raise UserError(f"corpus must have at least one record: got none in {first}. Try --corpus sample.") from e
        cause = e.__cause__ or e
        said = (str(cause).splitlines() or [""])[0][:150] or type(cause).__name__
        where = str(first) if sum(map(len, files.values())) == 1 else f"{first} or one beside it"
        raise UserError(
            f"corpus must be readable as {suffix[1:]}: got {where} ({said}). Try UTF-8 text with equal columns."
        ) from e


def read_hub(name: str, part: str | None, revision: str | None) -> Any:
    """Tables by split of a set on the hub, or of the local cache of it, or of a folder laid out as one.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    try:
        return _datasets().load_dataset(name, part, revision=revision)
    except Exception as e:  # the hub's, the network's and the parsers' errors have no common base
        first = (str(e).splitlines() or [""])[0][:200]
        raise UserError(
            f"corpus hf:{name} must be on the hub or in the local cache: got {type(e).__name__} ({first}). "
            "Try its name as the hub has it, or --corpus sample."
        ) from e


def require_columns(table: Any, columns: Mapping[str, str], where: str) -> None:
    """Raise UserError for the first of `columns` (flag's name to column) that a table lacks."""
    for flag, column in columns.items():
        if column not in table.column_names:
            own = flag if len(table.column_names) > 1 else "text_column"
            raise UserError(
                f"{flag} must be a column of {where}: got {column!r}, "
                f"it has {', '.join(table.column_names)}. Try --{own.replace('_', '-')} {table.column_names[0]}."
            )


def batched(items: Iterable[T], n: int) -> Iterator[list[T]]:
    """The items in lists of up to `n`."""
    left = iter(items)
    while part := list(itertools.islice(left, n)):
        yield part


def made_once(folder: Path, read: Callable[[Path], T | None], make: Callable[[Path], None]) -> T:
    """What `read` finds in a folder of a cache; where that is None it is made first.

    One process makes it while others wait, and renames it into place when it is complete.
    """
    if (found := read(folder)) is not None:
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if (found := read(folder)) is not None:
            return found
        shutil.rmtree(folder, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".draft-"))
        try:
            make(draft)
            draft.chmod(0o755)  # others may share the cache
            draft.rename(folder)
        except OSError:
            if read(folder) is None:  # on a host whose locks are not ours another may have put the same there
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    found = read(folder)
    assert found is not None
    return found


def _datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the error that is raised
    return datasets
