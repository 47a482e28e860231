"""What `--train-data` names: web shards, tables, folders, Hub datasets, or the bundled emoji.

`open_images` opens images without captions, for training on a teacher's outputs. What happens to odd inputs is one set
of rules for all sources: docs/data.md.
"""

from collections.abc import Sequence
from dataclasses import replace
from glob import glob
from itertools import islice
from pathlib import Path

from gkl_vl.addresses import is_local
from gkl_vl.data.captions import CaptionRule
from gkl_vl.data.files import subfolders, training_split
from gkl_vl.data.shards import checked_shards, is_shards, list_shards, shards_below
from gkl_vl.data.shards import split_of as shard_split
from gkl_vl.data.sources import (
    RawPair,
    Source,
    folder_source,
    memory_source,
    printable,
    read_shard,
    shard_source,
    table_source,
)
from gkl_vl.data.tables import ParquetRows, files_of_split, hub_rows, parquet_files, split_of
from gkl_vl.data.text_tables import ENDINGS as TEXT_TABLES
from gkl_vl.data.text_tables import Row, read_csv, read_jsonl
from gkl_vl.errors import UserError

BUNDLED = Path(__file__).parents[1] / "assets" / "emoji"
"""Folder of the bundled emoji."""
FIRST_PAIRS = 1000
"""Pairs among which each of several caption columns must have a caption."""


def open_source(
    train_data: str | None,
    *,
    columns: Sequence[str] | None = None,
    caption_lines: bool = False,
    quoted: bool | None = None,
) -> Source:
    """Opens the pairs that `--train-data` names. None = the bundled emoji.

        a-{000..9}.tar::b.tar, 'a-*.tar'    web shards, members KEY.jpg and KEY.txt or KEY.json (`caption`)
        s3://.../a-{000..9}.tar             shards and parquet at any address that fsspec reads; pipe:COMMAND
        x.csv, x.tsv                        a table with columns `filepath` and `title`
        x.jsonl, x.parquet, 'x-*.parquet'   tables with fields `image` and `caption`
        FOLDER, FOLDER:SPLIT                its shards, else its parquet, else images x.jpg with x.txt or x.json
        org/name, org/name:SPLIT            a dataset on the Hub

    Args:
        columns: image and captions, which may be in several. In tables, columns; in shards and folders, the ending of
            the image, and the endings or JSON fields of the captions. `a.b` = field b of the struct, or of each struct
            of the list, in a, or of the member .a where that ends in json.
        caption_lines: a text file holds one caption per line; False = it is one caption.
        quoted: of CSV and TSV, see `read_csv`.

    Raises: UserError for a source that does not exist or cannot be read.
    """
    if train_data is None:
        return memory_source("emoji", bundled_pairs())
    if columns is not None and len(columns) < 2:
        raise UserError(f"--columns {' '.join(columns)} must name the image and the caption column: name both")
    if columns is not None and len(set(columns)) < len(columns):
        raise UserError(f"--columns {' '.join(columns)} names one twice: leave it out")
    image, *captions = columns or (None,)
    source = _open(train_data, image, CaptionRule(tuple(captions), lines=caption_lines), quoted=quoted)
    if len(captions) > 1:
        _require_captions(source, captions)
    return source


def _require_captions(source: Source, columns: Sequence[str]) -> None:
    """Raises: UserError for one of several columns without a caption in the first pairs: a pair may lack one, so that a
    misspelt name would not be noticed."""
    seen: set[int] = set()
    for pair in islice(source.pairs.read(0), FIRST_PAIRS):
        seen |= {column for text, column in zip(pair.captions, pair.columns, strict=True) if text.strip()}
        if len(seen) == len(columns):
            return
    missing = next(name for number, name in enumerate(columns) if number not in seen)
    raise UserError(
        f"none of the first {FIRST_PAIRS:,} pairs of {source.name!r} has a caption in {missing!r}: check --columns"
    )


def open_images(data: str | None, *, column: str | None = None, quoted: bool | None = None) -> Source:
    """Opens the images that `--train-data` names, as for `open_source`. Their captions and labels are not read.

    None = the training drawings of the bundled emoji. The image column is `filepath` in CSV, elsewhere `img` or
    `image`; `column` is another, or of shards an ending. A folder may hold images alone, at any depth.

    Class names come from a table's ClassLabel, or from the folders if all images are in FOLDER/CLASS/; "_" becomes a
    space. Folders whose names are all numbers are no class names.

    Raises: UserError for a source that does not exist or cannot be read.
    """
    if data is None:
        names = tuple((BUNDLED / "classnames.txt").read_text(encoding="utf-8").splitlines())
        return replace(memory_source("emoji", bundled_pairs()), captioned=False, classnames=names)
    return replace(_open(data, column, None, quoted=quoted), captioned=False)


# ---- what a name means -------------------------------------------------------------------------------------------


def _open(name: str, image: str | None, rule: CaptionRule | None, *, quoted: bool | None) -> Source:
    """`rule` None = captions are not read."""
    path, split = _located(name)
    if Path(path).is_dir():
        return _open_folder(name, Path(path), split, image, rule)
    ending = Path(name).suffix.lower()
    if not is_local(name) and ending == ".parquet":
        return table_source(name, ParquetRows(list_shards(name)), image, rule)
    if not is_local(name) and ending in TEXT_TABLES:
        raise UserError(
            f"{name!r} is a table of image paths, and these are read on this machine alone: copy table and images, or "
            "pack them into shards"
        )
    if is_shards(name) or not is_local(name):
        return shard_source(name, list_shards(name), image, rule)
    if split is not None:
        raise UserError(f"{path!r} is one file and has no split {split!r}: leave out ':{split}'")
    if ending == ".parquet":
        return _open_parquet(name, [Path(file) for file in sorted(glob(name)) or [name]], image, rule)
    if ending in TEXT_TABLES:
        return _open_text_table(name, image, rule, quoted=quoted)
    if Path(name).exists():
        raise UserError(
            f"{name!r} is a file of an unknown kind: expected shards (.tar, .tgz), a table (.csv, .tsv, .jsonl, "
            ".parquet), a folder or a Hub dataset"
        )
    path, _, split = name.partition(":")
    hint = "shards end in .tar, tables in .csv, .tsv, .jsonl or .parquet"
    rows = hub_rows(path, split or "train", subject=f"--train-data {name!r}", hint=hint)
    return table_source(name, rows, image, rule)


def _located(name: str) -> tuple[str, str | None]:
    """An existing path, and the split named behind it: FOLDER:SPLIT."""
    path, colon, split = name.rpartition(":")
    if colon and not Path(name).exists() and Path(path).exists():
        return path, split
    return name, None


def _open_folder(name: str, folder: Path, split: str | None, image: str | None, rule: CaptionRule | None) -> Source:
    """The shards in a folder, else its parquet (img2dataset writes both), else its images; of one split."""
    if shards := shards_below(folder):
        chosen = training_split(set(map(shard_split, shards)), split=split, source=str(folder), classes=False)
        shards = [shard for shard in shards if chosen is None or shard_split(shard) == chosen]
        return shard_source(name, checked_shards(shards), image, rule)
    if files := parquet_files(folder):
        splits = {split_of(file, folder) for file in files} - {""}
        chosen = training_split(splits, split=split, source=str(folder), classes=False)
        return _open_parquet(
            name, files if chosen is None else files_of_split(files, folder, chosen, str(folder)), image, rule
        )
    chosen = training_split(subfolders(folder), split=split, source=str(folder))
    below = folder if chosen is None else folder / chosen
    if shards := shards_below(below):
        return shard_source(name, checked_shards(shards), image, rule)
    return folder_source(name, below, image, rule)


def _open_parquet(name: str, files: Sequence[Path], image: str | None, rule: CaptionRule | None) -> Source:
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"the table {str(missing[0])!r} does not exist")
    return table_source(name, ParquetRows(files), image, rule)


def _open_text_table(name: str, image: str | None, rule: CaptionRule | None, *, quoted: bool | None) -> Source:
    if not Path(name).is_file():
        raise UserError(f"the table {name!r} does not exist")
    if name.lower().endswith(".jsonl"):
        rows = read_jsonl(name, image or "image", rule)
    else:
        captions = () if rule is None else rule.fields or ("title",)
        rows = read_csv(name, image or "filepath", captions, quoted=quoted)
    if not rows:
        raise UserError(f"the table {name!r} holds no rows")
    return memory_source(name, [_pair_of_row(row, Path(name).parent) for row in rows])


def _pair_of_row(row: Row, folder: Path) -> RawPair:
    path, captions, problem = row
    if not path and not problem:
        problem = "a row without an image path"
    if "://" in path:
        problem = "its image is a URL: fetch the images first, for example with img2dataset"
    return RawPair(printable(path), str(folder / path), captions.texts, captions.columns, problem=problem)


# ---- in memory ---------------------------------------------------------------------------------------------------


def bundled_pairs() -> list[RawPair]:
    """The training split of the bundled emoji, in memory (7 MB encoded)."""
    return _bundled("train")


def bundled_style(half: int) -> list[RawPair]:
    """Every other drawing of the bundled test split, which has one style, from position 0 or 1."""
    return _bundled("test")[half::2]


def _bundled(split: str) -> list[RawPair]:
    rule = CaptionRule(lines=True)
    return [pair for shard in sorted((BUNDLED / split).glob("*.tar")) for pair in read_shard(str(shard), rule=rule)]
