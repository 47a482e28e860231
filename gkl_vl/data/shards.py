"""Web shards: tar files whose members are grouped into samples, by the same rules for training, labels and evaluation.

A sample is a run of consecutive members with the same key: the path up to the first dot of the file name, as in
webdataset. The rest of the name is the member's ending, in lower case. Hidden files and the remains of file managers
(`files.is_junk`) are skipped. A file without an ending is a sample without members.
"""

import gzip
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from webdataset.shardlists import expand_urls

from gkl_vl.addresses import is_local, json_at, opened
from gkl_vl.data.files import IMAGE_SUFFIXES, is_junk
from gkl_vl.data.images import BrokenSample
from gkl_vl.errors import UserError, first_line
from gkl_vl.reading import read_json, refuse_pointer

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
"""Endings of shards, in lower case. Only those of .tar can be read by position, for labels and evaluation."""
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
"""First bytes of gzip, bzip2 and xz."""


# ---- members -----------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """The tar members of one key, by ending."""

    key: str
    extents: dict[str, tuple[int, int]] = field(default_factory=dict)
    """First byte and number of bytes of each member; of a stream, the position is that in the stream."""
    contents: dict[str, bytes] = field(default_factory=dict)
    """Content of the members that were asked for."""
    repeated: str | None = None
    """An ending that occurs twice."""
    link: str | None = None
    """An ending whose member is a link to another file, which a stream cannot follow."""

    def image(self, ending: str | None = None) -> str:
        """Ending of the sample's image: the one in `IMAGE_SUFFIXES`, or the one given.

        Raises: BrokenSample where there is none, or more than one.
        """
        if self.repeated is not None:
            raise BrokenSample(f"two .{self.repeated} members: keep one")
        if self.link is not None:
            raise BrokenSample(
                f".{self.link} is a link to another file: pack the files themselves, with tar's --dereference and "
                "--hard-dereference"
            )
        images = [e for e in IMAGE_SUFFIXES if e in self.extents] if ending is None else [ending]
        if len(images) > 1:
            raise BrokenSample(f"two images, .{' and .'.join(images)}: keep one")
        if not images or images[0] not in self.extents:
            if ending is not None and self.extents:
                raise BrokenSample(
                    f"no .{ending} member, its members are .{', .'.join(self.extents)}: name one with --columns"
                )
            raise BrokenSample(f"no image, {self._members()}")
        return images[0]

    def _members(self) -> str:
        if not self.extents:
            return "its name has no ending"
        listed = f"its members are .{', .'.join(self.extents)}"
        if any(ending.rpartition(".")[2] in IMAGE_SUFFIXES for ending in self.extents):
            return f"{listed}: a key ends at its first dot, so write others in its place"
        return f"{listed}: members of a sample must follow each other"


def read_samples(shard: str, *, wanted: Callable[[str], bool], stream: bool = False) -> Iterator[Sample]:
    """Yields the samples of a tar file in order.

    Args:
        shard: a local file; with `stream` also an address or `pipe:command`, and compressed.
        wanted: whether to read the content of a member, by its ending.

    Raises: UserError for a shard that is damaged or ends before its end-of-archive mark.
    """
    sample: Sample | None = None
    try:
        file: Any = open(shard, "rb") if is_local(shard) else opened(shard, stream=True)
        # gzip reads files of several members, as pigz and bgzip write them; tarfile only the first.
        zipped, mode = shard.lower().endswith((".gz", ".tgz")), "r|*" if stream else "r:"
        with (
            file as raw,
            gzip.GzipFile(fileobj=raw) if zipped else nullcontext(raw) as content,
            tarfile.open(fileobj=content, mode=mode, tarinfo=_Header) as tar,
        ):
            for member in tar:
                directory, slash, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if is_junk(member.name) or stem.startswith("__"):  # webdataset's metadata
                    continue
                if not (member.isfile() or member.islnk() or member.issym()):
                    continue
                key, ending = directory + slash + stem, ending.lower()
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample
                    sample = Sample(key)
                _add(sample, ending, member, tar, wanted)
            _require_zeros(tar)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(
            f"the shard {shard!r} ends early or is damaged ({first_line(error)}): fetch it again or leave it out"
        ) from error
    if sample is not None:
        yield sample


def _add(
    sample: Sample, ending: str, member: tarfile.TarInfo, tar: tarfile.TarFile, wanted: Callable[[str], bool]
) -> None:
    if not ending:
        return
    if ending in sample.extents:
        sample.repeated = ending
    sample.extents[ending] = (member.offset_data, member.size)
    if not member.isfile():
        sample.link = ending
    elif wanted(ending):
        content = tar.extractfile(member)
        assert content is not None  # the member is a file
        sample.contents[ending] = content.read()


def _require_zeros(tar: tarfile.TarFile) -> None:
    """Raises: tarfile.ReadError for data behind the end-of-archive mark: another archive, which tar does not read."""
    assert tar.fileobj is not None
    while block := tar.fileobj.read(2**20):
        if block.strip(tarfile.NUL):
            raise tarfile.ReadError("data behind its end-of-archive mark, as of joined files: name them one by one")


class _Header(tarfile.TarInfo):
    """A member's header. tarfile takes the end of the file, or garbage, for the end of the archive; here only the
    end-of-archive mark, a block of zeros, is one."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "tarfile.TarInfo":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no end-of-archive mark at byte {tarfile_.offset}") from error


# ---- lists of shards ---------------------------------------------------------------------------------------------


def is_shards(source: str) -> bool:
    """Whether a name is one of shards: by the ending of its files, by `::`, or a command."""
    last = source.split("::")[-1].lower()
    return last.endswith(ENDINGS) or source.startswith("pipe:") or "::" in source


def list_shards(source: str) -> list[str]:
    """The files and addresses that a source names: `::` joins sources, braces expand, local `*`, `?` and `[]` match.

    Raises: UserError for a file that does not exist, is a Git LFS pointer or has no end-of-archive mark.
    """
    try:
        patterns = [pattern for part in source.split("::") for pattern in expand_urls(part)]
    except Exception as error:  # braceexpand's own, for braces that do not match
        raise UserError(f"{source!r}: {first_line(error)}: write a-{{000..999}}.tar") from error
    urls = [url for pattern in patterns for url in _matches(pattern)]
    for url in urls:
        path = url.partition("?")[0].lower()
        if "://" in url and not path.endswith((*ENDINGS, ".parquet")):
            raise UserError(
                f"{url!r} names no shard ({', '.join(ENDINGS)}) and no parquet file, and folders at an address are not "
                "listed: name its files, as ADDRESS/{000..999}.tar"
            )
    local = [url for url in urls if is_local(url)]
    missing = [url for url in local if not Path(url).is_file()]
    if missing:
        raise UserError(
            f"the shard {missing[0]!r} does not exist ({len(missing)} of {len(urls)} are missing): shards are written "
            "as a-{000..999}.tar, 'a-*.tar' or the name of their folder"
        )
    return checked_shards(urls)


def checked_shards(urls: Sequence[str | Path]) -> list[str]:
    """The URLs. Raises: UserError for a local file that is a Git LFS pointer or has no end-of-archive mark."""
    for url in map(str, urls):
        if is_local(url):
            refuse_pointer(url)
            _require_mark(url)
    return list(map(str, urls))


def split_of(shard: Path) -> str:
    """What stands before the number in the name of a shard, often a split: train-000.tar."""
    return re.split(r"[-_.]?\d|\.", shard.name, maxsplit=1)[0]


def shards_below(folder: Path) -> list[Path]:
    """The shards directly in a folder, sorted by name."""
    return sorted(p for p in folder.glob("*") if p.name.lower().endswith(ENDINGS) and not is_junk(p.name))


def _matches(pattern: str) -> list[str]:
    """Local files that match a glob; if there are none, the pattern itself, which is then reported as missing."""
    if not is_local(pattern) or Path(pattern).is_file():
        return [pattern]
    return sorted(path for path in glob(pattern) if not is_junk(os.path.basename(path))) or [pattern]


def _require_mark(shard: str) -> None:
    """Raises: UserError for an uncompressed tar that does not end in zeros: a copy that was cut short."""
    with open(shard, "rb") as file:
        if file.read(6).startswith(_COMPRESSED):
            return
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - tarfile.BLOCKSIZE, 0))
        if file.read() == tarfile.NUL * tarfile.BLOCKSIZE:
            return
    raise UserError(
        f"the shard {shard!r} ends early ({size} bytes without an end-of-archive mark): fetch it again or leave it out"
    )


# ---- sizes -------------------------------------------------------------------------------------------------------


def shard_sizes(urls: Sequence[str]) -> list[int | None]:
    """Pairs in each shard, from `sizes.json` beside it or img2dataset's `NAME_stats.json`; None if it is in neither.
    At an address, from `sizes.json` alone.

    Raises: UserError for a malformed file.
    """
    tables = {folder: _sizes_in(folder) for folder in dict.fromkeys(map(_folder, urls))}
    return [_shard_size(url, tables[_folder(url)]) for url in urls]


def _folder(url: str) -> str:
    return str(Path(url).parent) if is_local(url) else url.rpartition("/")[0]


def _sizes_in(folder: str) -> dict[str, Any] | None:
    """The content of a folder's sizes.json; None without one."""
    return None if folder.startswith("pipe:") else json_at(f"{folder}/sizes.json")


def _shard_size(url: str, table: dict[str, Any] | None) -> int | None:
    """`table` = the content of sizes.json; None without one."""
    if table is None and not is_local(url):
        return None
    shard = Path(url)
    if table is not None:
        file, size = f"{_folder(url)}/sizes.json", table.get(shard.name)
    else:
        file = shard.with_name(f"{shard.name.partition('.')[0]}_stats.json")
        size = read_json(file).get("successes") if file.is_file() else None
    if size is None:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise UserError(f"{str(file)!r} has {json.dumps(size)} for {shard.name}: write its number of pairs")
    if size == 0 and next(read_samples(url, wanted=lambda ending: False, stream=True), None) is not None:
        raise UserError(f"{str(file)!r} has 0 for {shard.name}, which holds pairs: correct it")
    return size


def total_size(urls: Sequence[str], sizes: Sequence[int | None]) -> int | None:
    """Pairs in all shards, from their sizes or from `__len__` files, one for each folder; None if unknown.

    Raises: UserError for a malformed file.
    """
    total = 0
    for folder in dict.fromkeys(map(_folder, urls)):
        of_folder = [size for url, size in zip(urls, sizes, strict=True) if _folder(url) == folder]
        known = [size for size in of_folder if size is not None]
        if len(known) == len(of_folder):
            total += sum(known)
            continue
        length = Path(folder) / "__len__"
        if not length.is_file():
            return None
        text = length.read_text(encoding="utf-8", errors="replace").strip()
        if not text.isdecimal():
            raise UserError(f"{str(length)!r} is {text[:50]!r}: write the number of pairs in its folder")
        total += int(text)
    return total
