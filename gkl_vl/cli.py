"""Entry point of every script: parses flags; a user error prints one line and exits with code 2."""

import contextlib
import errno
import io
import logging
import math
import os
import re
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, NoReturn, TypeVar, get_args, get_origin, get_type_hints

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

from gkl_vl.errors import Stopped, UserError, causes, disk_is_full, notice

INTERRUPTED = 130  # a shell's exit codes for SIGINT, SIGPIPE and SIGTERM: 128 + the signal number
BROKEN_PIPE = 141
TERMINATED = 143

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


class Bounds(NamedTuple):
    """Limits of a numeric flag; None = no limit."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    either: float | None = None
    """A value outside of the limits that is accepted too."""

    def allow(self, value: float) -> bool:
        """Whether a number is within the limits."""
        return value == self.either or (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        limits = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        text = " and ".join(f"{name} {limit}" for name, limit in limits.items() if limit is not None)
        return text if self.either is None else f"{text}, or {self.either}"


COUNT, SIZE = Bounds(at_least=1), Bounds(at_least=0)
BOUNDS: dict[str, Bounds] = {
    # length and batch
    **dict.fromkeys(("steps", "epochs", "batch_size", "accum_steps"), COUNT),
    **dict.fromkeys(("warmup", "warmup_steps", "warmup_epochs", "mu"), SIZE),
    # optimizer
    **dict.fromkeys(("lr", "text_lr", "wd"), SIZE),
    "layer_decay": Bounds(above=0, at_most=1),
    "interpolate": Bounds(at_least=0, at_most=1),
    "ema_decay": Bounds(at_least=0, below=1),
    # loss
    **dict.fromkeys(("contrastive_weight", "mimicry_weight", "soft_ce_weight", "wmse_weight", "gamma"), SIZE),
    **dict.fromkeys(("cross_soft_ce_weight", "cross_wmse_weight", "bank_size"), SIZE),
    **dict.fromkeys(("ce_weight", "kl_weight", "unlabelled_weight", "awp_gamma"), SIZE),
    **dict.fromkeys(("inherit_layers", "inherit_text_layers", "unlocked_groups"), SIZE),
    "lora_rank": COUNT,
    "lora_alpha": Bounds(above=0),
    "patch_dropout": Bounds(at_least=0, below=1),
    **dict.fromkeys(("temperature", "weight_temperature"), Bounds(above=0)),
    **dict.fromkeys(("teacher_scale", "teacher_shares", "caption_weights"), Bounds(above=0)),
    "threshold": Bounds(at_least=0, at_most=1),
    # data
    **dict.fromkeys(("images", "image_size", "num_labels", "stored_top_k", "captions_per_image"), COUNT),
    **dict.fromkeys(("views", "kept_size"), COUNT),
    "stored_views": SIZE,
    "imbalance": COUNT,
    "fraction": Bounds(at_least=0, at_most=1),
    # run
    "seed": Bounds(at_least=0, at_most=2**31 - 1),
    **dict.fromkeys(("workers", "num_workers", "keep_checkpoints"), SIZE),
    "stop_after": Bounds(above=0),
    **dict.fromkeys(
        ("eval_every_steps", "checkpoint_every_steps", "eval_every_epochs", "checkpoint_every_epochs"), SIZE
    ),
    # evaluation
    **dict.fromkeys(("robust_images", "attack_images", "masking_images", "recall_k"), COUNT),
    "fewshot_k": Bounds(at_least=1, either=-1),
    "max_drop": SIZE,
    "max_broken": Bounds(at_least=0, below=1),
}
"""Limits of all numeric flags by name, which mean the same in every script."""


MAY_BE_EMPTY = ("eval_data", "old_data", "export", "report_to", "milestones", "pretrained")
"""Flags of any number of values for which none means something."""


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


def run(main: Callable[[ConfigT], None], config: Callable[..., ConfigT], argv: Sequence[str] | None = None) -> None:
    """Parses flags into `config`, a frozen keyword-only dataclass with a string under each field, and calls `main`.

    `argv` defaults to the command line; `--a-b` and `--a_b` are the same flag. Fields that are dataclasses are groups
    of flags, without a prefix. The config must have a flag `debug: bool = False`.

    Exit codes: 2 with one line on stderr for a user error (a wrong flag, UserError, ValueError, OSError, the Hub's
    errors, CUDA out of memory), after the traceback with `--debug`; 0 for `Stopped`; 130 for Ctrl-C; 143 for SIGTERM;
    141 if the reader of stdout has closed the pipe. Any other exception is a bug and keeps its traceback. Ranks other
    than 0 prefix their line with the rank.
    """
    settings = parse(config, argv)
    if not sys.stderr.isatty():  # `datasets` is imported later and reads only this variable
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        disable_progress_bars()  # the Hub's download bars
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings repeat the error line
    try:
        with sigterm_raises():
            check_values(flat(settings))
            main(settings)
            sys.stdout.flush()  # a closed pipe must raise here, not at interpreter exit
    except Stopped as stopped:
        notice(str(stopped))
    except KeyboardInterrupt:
        exit_with("interrupted", INTERRUPTED)
    except Terminated:
        exit_with("terminated by SIGTERM", TERMINATED)
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
    words = sys.argv[1:] if argv is None else list(argv)
    for flag, word in zip(["", *words], words, strict=False):
        if not word.strip() or (word.startswith("--") and word.endswith("=")):  # an unset variable of the shell
            flag = word.rstrip("=") if word.strip() else flag
            exit_with(f"error: {flag} is an empty text: give a value, or leave it out", 2)
    words = joined_lists(config, words)
    box = io.StringIO()
    help_page = contextlib.nullcontext() if rank() == 0 else contextlib.redirect_stdout(io.StringIO())
    try:
        with help_page, contextlib.redirect_stderr(box):
            return tyro.cli(config, args=words, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if stop.code != 2:
            raise
        exit_with(f"error: {unbox(box.getvalue())} (--help lists the flags)", 2)


def joined_lists(config: Callable[..., Any], words: Sequence[str]) -> list[str]:
    """The words, with a flag of any number of values that is given twice, `--a 1 --a 2`, as `--a 1 2`; tyro would drop
    the first."""
    lists = _list_flags(config)
    others: list[str] = []
    values: dict[str, list[str]] = {}
    current = others  # where the values behind a flag go
    for word in words:
        name, equals, value = word.partition("=")
        flag = name.replace("_", "-")
        if word.startswith("--") and flag in lists:
            current = values.setdefault(flag, [])
            if equals:
                current.append(value)
            continue
        if word.startswith("--"):
            current = others
        current.append(word)
    return others + [word for flag, given in values.items() for word in (flag, *given)]


def _list_flags(config: Any) -> set[str]:
    """The flags of a config, a dataclass, that take any number of values."""
    flags = set()
    for name, hint in get_type_hints(config).items():
        for kind in (hint, *get_args(hint)):
            if is_dataclass(kind):
                flags |= _list_flags(kind)
            elif get_origin(kind) is tuple and ... in get_args(kind):
                flags.add(flag_name(name))
    return flags


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
    text = re.sub(r"\[/?bold\]", "", "; ".join(kept) or one_line(plain))  # markup inside of tyro's messages
    # of an optional value, which tyro tries as None first
    return re.sub(
        r"no type matching \{None\}\|\{?(.+?)\}? could be instantiated from (\[.*?\])\..*", r"expected \1, not \2", text
    )


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


def defaults(config: Any) -> dict[str, Any]:
    """The defaults of the flags of a config by name, without flags that have none."""
    flags: dict[str, Any] = {}
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if default is not MISSING:
            flags |= flat(default) if is_dataclass(default) else {field.name: default}
        elif is_dataclass(group := getattr(config, field.name)):
            flags |= defaults(group)
    return flags


def check_values(flags: Mapping[str, Any]) -> None:
    """Raises: UserError for a number that is not finite or out of its `BOUNDS`, and for an empty list, which an unset
    variable of the shell leaves. None is accepted."""
    for name, given in flags.items():
        values, flag = given if isinstance(given, tuple) else (given,), flag_name(name)
        if not values and name not in MAY_BE_EMPTY:
            raise UserError(f"{flag} has no value: give one, or leave it out")
        for value in values:
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_number(flag, value, BOUNDS.get(name, Bounds()))


def check_number(flag: str, value: float, bounds: Bounds) -> None:
    """Raises: UserError for a number that is not finite or out of bounds."""
    if not math.isfinite(value):
        raise UserError(f"{flag} {value} is not a finite number")
    if not bounds.allow(value):
        raise UserError(f"{flag} {value} must be {bounds}")


def flag_name(field: str) -> str:
    """A field of a config as its flag."""
    return f"--{field.replace('_', '-')}"


def shown(value: Any) -> str:
    """A flag's value as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def refuse_unused(flags: Mapping[str, Any], names: Sequence[str], reason: str) -> None:
    """Raises: UserError for the first of these flags that has a value other than None, with the reason."""
    for name in names:
        if flags[name] is not None:
            raise UserError(f"{flag_name(name)} {shown(flags[name])} {reason}: leave it out")


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM raises `Terminated` once, so that scratch files are removed and workers end; a second one kills."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield
        return

    def stop(number: int, frame: Any) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
