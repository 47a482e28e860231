"""The door of every script: flags become a config; what the user can mend ends in one line and code 2."""

import contextlib
import errno
import io
import logging
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

import torch
import tyro
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from gkl_vl.errors import UserError

INTERRUPTED = 130  # what a shell reports for SIGINT and SIGPIPE: 128 + the number of the signal
BROKEN_PIPE = 141

# A dead connection raises the base of the Hub's web errors; its library depends on the Hub's version.
WebError = HfHubHTTPError.__mro__[1]

OFFLINE_REMEDY = "go online and unset HF_HUB_OFFLINE, or name a local folder (local-dir:PATH)"
# First match wins: the special before the general.
REMEDIES: tuple[tuple[type[BaseException], str], ...] = (
    (torch.OutOfMemoryError, "lower --batch-size"),
    (GatedRepoError, "accept its terms on its Hub page, then run `hf auth login`"),
    (RepositoryNotFoundError, "check the name; a private one needs `hf auth login`"),
    (OfflineModeIsEnabled, OFFLINE_REMEDY),
    (LocalEntryNotFoundError, OFFLINE_REMEDY),
    (EntryNotFoundError, "the repository exists, the file does not: check the name"),
    (WebError, OFFLINE_REMEDY),
)


ConfigT = TypeVar("ConfigT")
Value = TypeVar("Value")


def run(main: Callable[[ConfigT], None], config: Callable[..., ConfigT], argv: Sequence[str] | None = None) -> None:
    """Parse flags into `config`, a frozen keyword-only dataclass with a string under each field; call `main`.

    `argv` defaults to the command line; `--a-b` and `--a_b` are one flag. Fields that are dataclasses are groups of
    flags, without a prefix. One flag is `debug: bool = False`.

    Exit codes: 2 with one line on stderr for a mistake that the user can mend (a wrong flag, UserError,
    ValueError, OSError, the Hub's errors, a full GPU), after the traceback if `--debug` is given; 130 for
    Ctrl-C; 141 when the reader of our output has left. Any other exception is a bug and keeps its traceback.
    Ranks other than 0 sign their line.
    """
    settings = parse(config, argv)
    if not sys.stderr.isatty():  # `datasets`, imported where it is needed, asks for its bars only here
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        disable_progress_bars()  # the Hub's, over downloads
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it warns of on its way, our line says
    try:
        main(settings)
        sys.stdout.flush()  # here, where a reader that left can still be noticed
    except KeyboardInterrupt:
        leave("interrupted", INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_has_left():
            sys.exit(BROKEN_PIPE)
        line = explain(error)
        if line is None:
            raise
        if flat(settings)["debug"]:
            traceback.print_exc()
        leave(f"error: {line}", 2)


def parse(config: Callable[..., ConfigT], argv: Sequence[str] | None) -> ConfigT:
    box = io.StringIO()
    help_page = contextlib.nullcontext() if rank() == 0 else contextlib.redirect_stdout(io.StringIO())
    try:
        with help_page, contextlib.redirect_stderr(box):
            return tyro.cli(config, args=argv, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if stop.code != 2:
            raise
        leave(f"error: {unbox(box.getvalue())} (--help lists the flags)", 2)


def unbox(box: str) -> str:
    """tyro's framed message as one line, without the title, the help texts and the pointer to --help.

    A suggestion survives: `Unrecognized options: --bath-size, 4; Perhaps you meant: --batch-size INT`.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    blocks: list[list[str]] = [[]]
    for line in plain.splitlines():
        if not line.startswith(("│ ", "  ")):  # the frame, which is blank where the terminal has no UTF-8
            continue
        text = line[2:].rstrip("│ ")
        if not text.strip("─- "):  # a rule between two blocks
            blocks.append([])
        elif not text.startswith(" " * 8):  # flags are indented by four, their help by eight
            blocks[-1].append(text.strip())
    sentences = [" ".join(block) for block in blocks if block]
    told = [s for s in sentences if not s.startswith(("Argument helptext", "For full helptext"))]
    return "; ".join(told) or one_line(plain)


def named(table: Mapping[str, Value], name: str, *, flag: str) -> Value:
    """The table's entry. Raises: UserError for a name that it has not, with the nearest one."""
    if name not in table:
        near = get_close_matches(name, list(table), n=1, cutoff=0)
        raise UserError(f"unknown {flag} {name!r}, did you mean {near[0]!r}? There are {', '.join(table)}")
    return table[name]


def flat(config: Any) -> dict[str, Any]:
    """All flags of a config by name, those of its groups (fields that are dataclasses) included."""
    flags: dict[str, Any] = {}
    for name, value in vars(config).items():
        flags |= flat(value) if is_dataclass(value) else {name: value}
    return flags


def require_positive(config: object, *names: str) -> None:
    """Raises: UserError for a field of `config` that is below 1; None is left alone."""
    for name in names:
        value = flat(config)[name]
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")


def explain(error: Exception) -> str | None:
    """The one line for an error that the user can mend; None for one that is ours."""
    text = last_cause(str(error))
    if isinstance(error, UserError):
        return text
    if disk_is_full(error):
        return f"no space left on the disk{place(error)}: free some, or choose another --output-dir ({text})"
    for cause in causes(error):  # open_clip wraps the Hub's errors in a RuntimeError
        for kind, remedy in REMEDIES:
            if isinstance(cause, kind):
                return f"{text.rstrip('.')}: {remedy}"
    if isinstance(error, OSError):
        refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        remedy = ": change its permissions, or choose another path" if refused else ""
        return f"{error.strerror}{place(error)}{remedy}" if error.strerror else text
    if isinstance(error, ValueError):
        return f"{text} (--debug shows where)"
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def disk_is_full(error: Exception) -> bool:
    """Python says ENOSPC, safetensors has words for it, torch.save a position that its file did not reach."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    torch_save = isinstance(error, RuntimeError) and "inline_container.cc" in str(error)
    return "No space left on device" in str(error) or (torch_save and "unexpected pos" in str(error))


def place(error: Exception) -> str:
    return f" at {error.filename}" if isinstance(error, OSError) and error.filename is not None else ""


def last_cause(text: str) -> str:
    """One line; of a data loader worker's traceback only the exception at its end."""
    if "Original Traceback (most recent call last)" in text:
        text = re.sub(r"^[\w.]+: ", "", text.strip().splitlines()[-1])
    return one_line(text)


def one_line(text: str) -> str:
    return " ".join(text.split())


def reader_has_left() -> bool:
    """True when it is stdout's pipe that broke (`| head`); redirected, or Python would complain at exit."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in stdout.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def leave(line: str, code: int) -> NoReturn:
    signature = f"[rank {rank()}] " if rank() else ""
    print(f"{signature}{line}", file=sys.stderr, flush=True)
    sys.exit(code)
