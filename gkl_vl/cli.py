"""Entry point of every script: parses flags; a user error prints one line and exits with code 2."""

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

INTERRUPTED = 130  # a shell's exit codes for SIGINT and SIGPIPE: 128 + the signal number
BROKEN_PIPE = 141

# A failed connection raises the base class of the Hub's web errors; its library depends on the Hub's version.
WebError = HfHubHTTPError.__mro__[1]

OFFLINE_REMEDY = "go online and unset HF_HUB_OFFLINE, or name a local folder (local-dir:PATH)"
# The first match counts: subclasses before their bases.
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
    """Parses flags into `config`, a frozen keyword-only dataclass with a string under each field, and calls `main`.

    `argv` defaults to the command line; `--a-b` and `--a_b` are the same flag. Fields that are dataclasses are groups
    of flags, without a prefix. The config must have a flag `debug: bool = False`.

    Exit codes: 2 with one line on stderr for a user error (a wrong flag, UserError, ValueError, OSError, the Hub's
    errors, CUDA out of memory), after the traceback with `--debug`; 130 for Ctrl-C; 141 if the reader of stdout has
    closed the pipe. Any other exception is a bug and keeps its traceback. Ranks other than 0 prefix their line with
    the rank.
    """
    settings = parse(config, argv)
    if not sys.stderr.isatty():  # `datasets` is imported later and reads only this variable
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        disable_progress_bars()  # the Hub's download bars
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings repeat the error line
    try:
        main(settings)
        sys.stdout.flush()  # a closed pipe must raise here, not at interpreter exit
    except KeyboardInterrupt:
        exit_with("interrupted", INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and stdout_is_closed():
            sys.exit(BROKEN_PIPE)
        line = error_line(error)
        if line is None:
            raise
        if flat(settings)["debug"]:
            traceback.print_exc()
        exit_with(f"error: {line}", 2)


def parse(config: Callable[..., ConfigT], argv: Sequence[str] | None) -> ConfigT:
    box = io.StringIO()
    help_page = contextlib.nullcontext() if rank() == 0 else contextlib.redirect_stdout(io.StringIO())
    try:
        with help_page, contextlib.redirect_stderr(box):
            return tyro.cli(config, args=argv, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if stop.code != 2:
            raise
        exit_with(f"error: {unbox(box.getvalue())} (--help lists the flags)", 2)


def unbox(box: str) -> str:
    """Turns tyro's framed message into one line, without the title, the help texts and the pointer to --help.

    Keeps suggestions: `Unrecognized options: --bath-size, 4; Perhaps you meant: --batch-size INT`.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    blocks: list[list[str]] = [[]]
    for line in plain.splitlines():
        if not line.startswith(("│ ", "  ")):  # the frame is blank on a terminal without UTF-8
            continue
        text = line[2:].rstrip("│ ")
        if not text.strip("─- "):  # a rule between two blocks
            blocks.append([])
        elif not text.startswith(" " * 8):  # flags are indented by four, their help by eight
            blocks[-1].append(text.strip())
    sentences = [" ".join(block) for block in blocks if block]
    kept = [s for s in sentences if not s.startswith(("Argument helptext", "For full helptext"))]
    return "; ".join(kept) or one_line(plain)


def named(table: Mapping[str, Value], name: str, *, flag: str) -> Value:
    """Returns `table[name]`. Raises: UserError for an unknown name, with the nearest known one."""
    if name not in table:
        near = get_close_matches(name, list(table), n=1, cutoff=0)
        raise UserError(f"unknown {flag} {name!r}, did you mean {near[0]!r}? There are {', '.join(table)}")
    return table[name]


def flat(config: Any) -> dict[str, Any]:
    """All flags of a config by name, including those of its groups (fields that are dataclasses)."""
    flags: dict[str, Any] = {}
    for name, value in vars(config).items():
        flags |= flat(value) if is_dataclass(value) else {name: value}
    return flags


def require_positive(config: object, *names: str) -> None:
    """Raises: UserError for a named field of `config` below 1; None is accepted."""
    for name in names:
        value = flat(config)[name]
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")


def error_line(error: Exception) -> str | None:
    """The error line of a user error; None for a bug of this package."""
    text = last_cause(str(error))
    if isinstance(error, UserError):
        return text
    if disk_is_full(error):
        return f"no space left on the disk{location(error)}: free some, or choose another --output-dir ({text})"
    for cause in causes(error):  # open_clip wraps the Hub's errors in a RuntimeError
        for kind, remedy in REMEDIES:
            if isinstance(cause, kind):
                return f"{text.rstrip('.')}: {remedy}"
    if isinstance(error, OSError):
        refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        remedy = ": change its permissions, or choose another path" if refused else ""
        return f"{error.strerror}{location(error)}{remedy}" if error.strerror else text
    if isinstance(error, ValueError):
        return f"{text} (--debug shows where)"
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and the chain of its causes and contexts."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def disk_is_full(error: Exception) -> bool:
    """Recognises the errors of Python (errno), safetensors (message) and torch.save (an unexpected file position)."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    torch_save = isinstance(error, RuntimeError) and "inline_container.cc" in str(error)
    return "No space left on device" in str(error) or (torch_save and "unexpected pos" in str(error))


def location(error: Exception) -> str:
    return f" at {error.filename}" if isinstance(error, OSError) and error.filename is not None else ""


def last_cause(text: str) -> str:
    """`text` on one line; of the traceback of a data loader worker only the exception at its end."""
    if "Original Traceback (most recent call last)" in text:
        text = re.sub(r"^[\w.]+: ", "", text.strip().splitlines()[-1])
    return one_line(text)


def one_line(text: str) -> str:
    return " ".join(text.split())


def stdout_is_closed() -> bool:
    """Whether the broken pipe is stdout (`| head`). If so, redirects stdout to avoid a second error at exit."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in stdout.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def exit_with(line: str, code: int) -> NoReturn:
    """Prints the line to stderr, prefixed with the rank if that is not 0, and exits."""
    prefix = f"[rank {rank()}] " if rank() else ""
    print(f"{prefix}{line}", file=sys.stderr, flush=True)
    sys.exit(code)
