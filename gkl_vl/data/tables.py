"""Tables of images: parquet files, read in place, and datasets on the Hub.

`Rows` gives rows by index, with images left encoded. Parquet files are read a row group at a time and never copied, so
that rows should be read nearly in order.
"""

import copy
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow
import pyarrow.parquet

from gkl_vl.addresses import is_local, opened
from gkl_vl.data.files import is_junk, one_split
from gkl_vl.errors import UserError, first_line, refuse_full_disk

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
CACHED_BYTES = 2**28
"""Row groups of a parquet set that a process keeps in memory; the last one is always kept."""


@runtime_checkable
class Rows(Protocol):
    """A table by row, picklable for worker processes."""

    @property
    def schema(self) -> pyarrow.Schema: ...

    @property
    def block_sizes(self) -> Sequence[int] | None:
        """Rows of each consecutive part that is read at once; None = rows in any order cost the same."""
        ...

    def folder(self, index: int, /) -> Path | None:
        """The folder that a relative path of an image in this row starts from; None = the current one."""
        ...

    def select(self, columns: Sequence[str], /) -> "Rows":
        """The same rows with these columns."""
        ...

    def row(self, index: int, /) -> dict[str, Any]:
        """A row; an image is its bytes, its path, or a struct with `bytes` and `path`."""
        ...

    def column(self, name: str, /) -> pyarrow.ChunkedArray:
        """A whole column."""
        ...

    def __len__(self) -> int: ...


# ---- parquet -----------------------------------------------------------------------------------------------------


class ParquetRows:
    """The rows of parquet files one after another.

    Raises: UserError for a file that cannot be read, or whose columns differ from those of the first.
    """

    def __init__(self, files: Sequence[str | Path]):
        """`files`: paths or addresses."""
        self.files = tuple(map(str, files))
        self._groups: list[tuple[int, int]] = []  # (file, row group)
        self._sizes: list[int] = []
        for number, file in enumerate(self.files):
            with _opened(file) as parquet:
                if number == 0:
                    self._schema = parquet.schema_arrow
                _require_equal(self.files[0], self._schema, file, parquet.schema_arrow)
                for group in range(parquet.num_row_groups):
                    self._groups.append((number, group))
                    self._sizes.append(parquet.metadata.row_group(group).num_rows)
        self._ends = list(accumulate(self._sizes))
        self._columns: Sequence[str] | None = None
        self._cache: OrderedDict[int, pyarrow.Table] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_cache": OrderedDict()}

    @property
    def schema(self) -> pyarrow.Schema:
        return self._schema

    @property
    def block_sizes(self) -> Sequence[int]:
        return self._sizes

    def folder(self, index: int) -> Path | None:
        number, _ = self._groups[bisect_right(self._ends, index)]
        return Path(self.files[number]).parent if is_local(self.files[number]) else None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def select(self, columns: Sequence[str]) -> "ParquetRows":
        chosen = copy.copy(self)
        chosen._columns, chosen._cache = list(columns), OrderedDict()
        return chosen

    def row(self, index: int) -> dict[str, Any]:
        group = bisect_right(self._ends, index)
        first = self._ends[group] - self._sizes[group]
        return self._group(group).slice(index - first, 1).to_pylist()[0]

    def column(self, name: str) -> pyarrow.ChunkedArray:
        tables = []
        for file in self.files:
            with _opened(file) as parquet:
                tables.append(parquet.read(columns=[name]))
        return pyarrow.concat_tables(tables).column(name)

    def _group(self, group: int) -> pyarrow.Table:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        number, of_file = self._groups[group]
        with _opened(self.files[number]) as parquet:
            # One thread: worker processes are forked, and arrow's threads do not survive a fork.
            table = parquet.read_row_group(of_file, columns=self._columns, use_threads=False)
        self._cache[group] = table
        while len(self._cache) > 1 and sum(kept.nbytes for kept in self._cache.values()) > CACHED_BYTES:
            self._cache.popitem(last=False)
        return table


@contextmanager
def _opened(file: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    """An open parquet file. Raises: UserError for errors of the file, inside the block as well."""
    try:
        with nullcontext(file) if is_local(file) else opened(file, stream=False) as source:
            with pyarrow.parquet.ParquetFile(source) as parquet:
                yield parquet
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"the parquet file {file!r} cannot be read ({first_line(error)}): fetch it again") from error


def _require_equal(first: str, expected: pyarrow.Schema, file: str, schema: pyarrow.Schema) -> None:
    """Raises: UserError for files of different columns, or columns of different types."""
    columns, other = ({field.name: field.type for field in each} for each in (expected, schema))
    for name in [*columns, *other]:
        if columns.get(name) != other.get(name):
            in_other = "lacks it" if name not in other else f"has it as {other[name]}"
            known = "lacks it" if name not in columns else f"has it as {columns[name]}"
            raise UserError(
                f"column {name!r} differs between parquet files: {str(first)!r} {known}, {str(file)!r} {in_other}: "
                "name files of one table"
            )
    names, other_names = (class_labels(each) for each in (expected, schema))
    if names != other_names:
        raise UserError(
            f"the class names of {str(first)!r} and {str(file)!r} differ, in themselves or in their order: name files "
            "of one table"
        )


def parquet_files(folder: Path) -> list[Path]:
    """Parquet files directly in a folder or one or two levels down, sorted; no deeper, since an image folder may have a
    million files there."""
    patterns = ("*.parquet", "*/*.parquet", "*/*/*.parquet")
    files = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in files if not is_junk(str(path.relative_to(folder))))


def split_of(file: Path, root: Path) -> str:
    """The split that a parquet file belongs to, by the Hub's layouts: train-00000-of-00002.parquet, train.parquet,
    train/0000.parquet. "" = none."""
    name = re.sub(r"-?\d.*", "", file.stem)
    if name not in ("", "part"):
        return name
    return "" if file.parent == root else file.parent.name


def files_of_split(files: Sequence[Path], root: Path, split: str, source: str) -> list[Path]:
    """The parquet files of a split. Raises: UserError for a missing split, or one that lies in several folders."""
    split = one_split([split_of(file, root) for file in files], split=split, source=source)
    chosen = [file for file in files if split_of(file, root) == split]
    folders = sorted({str(file.parent) for file in chosen})
    if len(folders) > 1:
        raise UserError(f"{source!r} has parquet of {split!r} in {' and '.join(folders)}: name one of these folders")
    return chosen


# ---- the Hub -----------------------------------------------------------------------------------------------------


class HubRows:
    """The rows of a `datasets.Dataset`, which is memory-mapped."""

    def __init__(self, table: Any):
        import datasets

        self.table = table
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                self.table = self.table.cast_column(name, datasets.Image(decode=False))

    @property
    def schema(self) -> pyarrow.Schema:
        return self.table.features.arrow_schema

    @property
    def block_sizes(self) -> None:
        return None

    def folder(self, index: int) -> None:
        return None

    def __len__(self) -> int:
        return len(self.table)

    def select(self, columns: Sequence[str]) -> "HubRows":
        return HubRows(self.table.select_columns(list(columns)))

    def row(self, index: int) -> dict[str, Any]:
        return self.table[index]

    def column(self, name: str) -> pyarrow.ChunkedArray:
        return self.table.data.column(name)


def hub_rows(path: str, split: str, *, subject: str, hint: str) -> HubRows:
    """Loads a split of a dataset on the Hub.

    Args:
        subject: what could not be loaded; the error message starts with it.
        hint: what else the user can do; the error message ends with it.

    Raises: UserError if the split cannot be loaded.
    """
    import datasets

    try:
        return HubRows(datasets.load_dataset(path, split=split))
    except Exception as error:  # the client's errors for offline, unknown, private: the remedy is the same
        refuse_full_disk(error)
        raise UserError(
            f"{subject} is no file here and could not be had from the Hub ({first_line(error)}): check the name "
            f"and the connection; {hint}"
        ) from error


# ---- columns -----------------------------------------------------------------------------------------------------


def usual_column(usual: Sequence[str], existing: Sequence[str]) -> str:
    """The first of the usual names that exists; if none does, the last of them, which `need_columns` then reports."""
    return next((name for name in usual if name in existing), usual[-1])


def need_columns(name: str, columns: Sequence[str], *needed: str) -> None:
    """Raises: UserError if a needed column of the table `name` is missing."""
    for column in needed:
        if not any(columns):
            raise UserError(f"{name!r} is empty: write a header with the column {column!r}, and rows")
        if column not in columns:
            raise UserError(f"{name!r} has no column {column!r}, only {', '.join(columns)}: name them with --columns")
        if list(columns).count(column) > 1:
            raise UserError(f"{name!r} has the column {column!r} twice: rename one")


def require_image_column(name: str, schema: pyarrow.Schema, column: str) -> None:
    """Raises: UserError for a missing column, or one of a type that holds no encoded image and no path."""
    need_columns(name, schema.names, column)
    kind = _plain(schema.field(column).type)
    types = pyarrow.types
    if types.is_struct(kind) and {"bytes", "path"} & {kind.field(i).name for i in range(kind.num_fields)}:
        return
    if not any(
        is_type(kind) for is_type in (types.is_binary, types.is_large_binary, types.is_string, types.is_large_string)
    ):
        raise UserError(
            f"{name!r}: column {column!r} is {kind}, no encoded image (bytes, a path, or a struct of both): name "
            "another with --columns"
        )


def require_text_column(name: str, schema: pyarrow.Schema, field: str) -> str:
    """The column of a caption field, which may be `column.field`.

    Raises: UserError for a missing column or field, or one that holds neither texts nor lists of texts.
    """
    column, *path = [field] if field in schema.names else field.split(".")
    need_columns(name, schema.names, column)
    kind, at = _element(schema.field(column).type), column
    for part in path:
        fields = _fields(kind)
        if part not in fields:
            raise UserError(f"{name!r}: {at!r} has no field {part!r}, only {', '.join(fields) or 'values'}")
        kind, at = _element(fields[part]), f"{at}.{part}"
    if fields := _fields(kind):
        raise UserError(
            f"{name!r}: {at!r} is a struct of {', '.join(fields)}: name one with --columns, as "
            f"{at}.{next(iter(fields))}"
        )
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{name!r}: {at!r} is {kind}, not text: name another with --columns")
    return column


def _fields(kind: pyarrow.DataType) -> dict[str, pyarrow.DataType]:
    if not pyarrow.types.is_struct(kind):
        return {}
    return {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}


def _element(kind: pyarrow.DataType) -> pyarrow.DataType:
    """The type of a list's elements, at any depth of 1; any other type unchanged."""
    kind = _plain(kind)
    types = pyarrow.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _plain(kind.value_type)
    return kind


def _plain(kind: pyarrow.DataType) -> pyarrow.DataType:
    """The type of the values of a dictionary-encoded (categorical) column."""
    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def image_of(cell: Any, folder: Path | None) -> Any:
    """The encoded bytes or the path in a table cell, for `images.decode`; a relative path is one from `folder`."""
    image = (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell
    return str(folder / image) if folder is not None and isinstance(image, str) and image else image


def class_labels(schema: pyarrow.Schema, column: str | None = None) -> tuple[str, tuple[str, ...]] | None:
    """Column and class names of a table's ClassLabel: of the column named, else of a usual one, else of the first.

    None without a ClassLabel.
    """
    import datasets

    features = datasets.Features.from_arrow_schema(schema)
    labels = {name: feature for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    names = (*LABEL_COLUMNS, *labels) if column is None else (column,)
    chosen = next((name for name in names if name in labels), None)
    return None if chosen is None else (chosen, tuple(labels[chosen].names))


def integers(name: str, rows: Rows, column: str) -> np.ndarray:
    """A column of integer labels. Raises: UserError for another type, and for missing values."""
    need_columns(name, rows.schema.names, column)
    labels = rows.column(column)
    if not pyarrow.types.is_integer(labels.type) or labels.null_count:
        raise UserError(f"{name}: column {column!r} is not all integers: name another with --columns")
    return labels.to_numpy()
