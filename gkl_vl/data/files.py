"""Files of data sources: which are read, by name, and parts of them. The same rules for every source."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gkl_vl.errors import UserError, first_line, notice

IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg", "bmp", "tif", "tiff", "ppm", "pgm", "gif")
"""File name endings of images, in lower case, for every source."""
_JUNK = ("__MACOSX", "__pycache__", "lost+found", "$RECYCLE.BIN", "System Volume Information")
_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing", "unlabeled")
"""Usual names of splits."""


# ---- names -------------------------------------------------------------------------------------------------------


def is_junk(path: str) -> bool:
    """Whether a relative path is hidden (a part starts with a dot) or left by a file manager: never a class or sample.

    Among them are .ipynb_checkpoints, .DS_Store, ._name (macOS), __MACOSX and __pycache__.
    """
    return any((part.startswith(".") and part not in (".", "..")) or part in _JUNK for part in path.split("/"))


def subfolders(folder: str | Path) -> list[str]:
    """Names of the folders in a folder, without what `is_junk`, sorted."""
    return sorted(path.name for path in Path(folder).iterdir() if path.is_dir() and not is_junk(path.name))


def image_paths(folder: str | Path) -> tuple[list[str], dict[str, int]]:
    """The images of a folder at any depth, and how many files have which other ending.

    Links to folders are followed, except to a folder above the link.

    Returns: paths relative to the folder, sorted, without what `is_junk`; {ending: number of files}.
    """
    images, others = [], Counter()
    for directory, folders, files in os.walk(folder, followlinks=True):
        above = f"{os.path.realpath(directory)}/"
        folders[:] = [
            name
            for name in folders
            if not is_junk(name) and not above.startswith(f"{os.path.realpath(os.path.join(directory, name))}/")
        ]
        below = os.path.relpath(directory, folder)
        for name in files:
            if is_junk(name):
                continue
            ending = name.rpartition(".")[2].lower() if "." in name else ""
            if ending in IMAGE_SUFFIXES:
                images.append(name if below == "." else f"{below}/{name}")
            else:
                others[ending] += 1
    return sorted(images), dict(others)


def endings_text(endings: Mapping[str, int]) -> str:
    """Endings with their number of files, the most frequent first, for messages; "nothing" without any."""
    order = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {'.' + ending if ending else 'without ending'}" for ending, count in order[:5]]
    return (", ".join(shown) + (", ..." if len(order) > 5 else "")) or "nothing"


def one_split(existing: Iterable[str], *, split: str, source: str) -> str:
    """The split as the source spells it: "validation" may be "val". Raises: UserError for a split it does not have."""
    names = sorted(set(existing))
    if split not in names and split == "validation" and "val" in names:
        return "val"
    same = [name for name in names if _as_split(name) == _as_split(split)]
    if split not in names and len(same) == 1:
        return same[0]
    if split not in names:
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(f"{source!r} has no split {split!r}, splits there: {listed or 'none'}")
    return split


def training_split(existing: Iterable[str], *, split: str | None, source: str, classes: bool = True) -> str | None:
    """The split to train on: the one named, else the one of training. None = the source has no splits, so all of it.

    Names are compared without case and numbers: COCO's is train2017.

    Args:
        classes: the names may be those of classes. They are splits only if all are: "train" among others is a class of
            vehicles.

    Raises: UserError for a split that it does not have, and where none is named and it is not clear which to take.
    """
    names = sorted(set(existing))
    if split is not None:
        return one_split(names, split=split, source=source)
    splits = [name for name in names if _as_split(name) in _SPLITS]
    if not splits or (classes and len(splits) < len(names) and len(splits) < 2):
        return None
    train = [name for name in splits if _as_split(name) == "train"]
    if len(splits) < len(names) or len(train) != 1:
        raise UserError(
            f"{source!r} has {', '.join(names)}, and which of these to train on is not clear: name one, as "
            f"{source}:{splits[0]}"
        )
    if len(splits) > 1:
        others = [name for name in splits if name not in train]
        notice(f"{source}: {train[0]} is read, not {', '.join(others)}; name another as {source}:{others[0]}")
    return train[0]


def _as_split(name: str) -> str:
    """The name of a split without case and the numbers behind it."""
    return re.sub(r"[-_]?\d+$", "", name).lower()


def note_others(folder: str, others: Mapping[str, int]) -> None:
    """Prints how many files of a folder are not read, by ending."""
    if others:
        notice(f"{folder} has files that are no images and are not read: {endings_text(others)}")


# ---- reading -----------------------------------------------------------------------------------------------------


def read_file(path: str, offset: int = 0, size: int = -1) -> bytes:
    """Reads `size` bytes of a file from `offset` on; -1 = up to the end.

    Raises: UserError for a file that cannot be read or is too short.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            body = file.read(size)
    except OSError as error:
        raise UserError(f"{path!r} cannot be read ({first_line(error)}): fetch it again") from error
    if len(body) < size:
        raise UserError(f"{path!r} ends before byte {offset + size}: fetch it again")
    return body


def require_images(source: str, folder: str, paths: Sequence[str]) -> None:
    """Raises: UserError if a file that `source` lists is not below `folder`."""
    missing = [path for path in paths if not os.path.isfile(os.path.join(folder, path))]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(paths)} images of {source!r} are not below {folder!r}, the first is "
            f"{missing[0]!r}: fetch them or name another root"
        )


def stable_hash(text: str) -> int:
    """A 63-bit hash of the text, the same in every process and run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
