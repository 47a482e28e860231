"""A user error prints one line to stderr and exits with code 2, a bug keeps its traceback, Ctrl-C, SIGTERM and `| head`
end quietly, and a flag has two spellings and a help text."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from typing import Annotated, Literal

import huggingface_hub
import pytest
import torch
import tyro
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch._utils import ExceptionWrapper

from gkl_vl import cli
from gkl_vl.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Distil a made-up CLIP."""

    batch_size: int = 3
    """Samples per process."""
    precision: Literal["no", "bf16"] = "no"
    """Arithmetic of the forward pass."""
    train_data: str | None = None
    """Shards, or nothing."""
    debug: bool = False
    """Show the traceback of an error."""


def outcome(main, argv, capfd) -> tuple[int, list[str]]:
    """Exit code and the lines on stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.run(main, Config, argv)
    return stop.value.code, capfd.readouterr().err.splitlines()


def raising(error: BaseException):
    def main(config: Config) -> None:
        raise error

    return main


def refused(argv: list[str], capfd) -> str:
    code, lines = outcome(raising(AssertionError("main must not run")), argv, capfd)
    assert code == 2
    assert len(lines) == 1
    return lines[0]


def stderr_line(main, capfd) -> str:
    code, lines = outcome(main, [], capfd)
    assert code == 2
    assert len(lines) == 1
    return lines[0]


def error_line(error: Exception, capfd) -> str:
    return stderr_line(raising(error), capfd)


@pytest.mark.parametrize("argv", [["--batch-size", "7"], ["--batch_size", "7"], ["--batch-size=7"], ["--batch_size=7"]])
def test_a_flag_is_spelt_with_dashes_or_underscores(argv):
    seen = []
    cli.run(seen.append, Config, argv)
    assert seen == [Config(batch_size=7)]


def test_no_flags_give_the_defaults():
    seen = []
    cli.run(seen.append, Config, [])
    assert seen == [Config()]


def test_help_shows_the_text_under_each_field(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(raising(AssertionError()), Config, ["--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    for text in ("Distil a made-up CLIP.", "--batch-size INT", "Samples per process.", "(default: 3)"):
        assert text in page


def test_help_is_printed_by_one_rank(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        cli.run(raising(AssertionError()), Config, ["--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == ""


def test_a_misspelt_flag_is_answered_with_the_correct_one(capfd):
    line = refused(["--batch-sise", "4"], capfd)
    message = "error: Unrecognized options: --batch-sise, 4; Perhaps you meant: --batch-size INT"
    assert line == f"{message} (--help lists the flags)"


def test_two_misspelt_flags_are_answered_on_one_line(capfd):
    line = refused(["--batch-sise", "4", "--train-dta", "x"], capfd)
    assert "--batch-size INT" in line
    assert "--train-data" in line


def test_an_unknown_flag_is_named(capfd):
    assert "--zork" in refused(["--zork"], capfd)


def test_a_word_that_is_not_a_flag_is_named(capfd):
    assert "zork" in refused(["zork"], capfd)


def test_a_value_of_the_wrong_type_is_named_with_its_flag(capfd):
    line = refused(["--batch-size", "many"], capfd)
    assert "--batch-size" in line
    assert "'many'" in line
    assert "Samples per process." not in line  # help texts belong to --help


def test_a_wrong_choice_is_answered_with_the_choices(capfd):
    line = refused(["--precision", "fp8"], capfd)
    assert "fp8" in line
    assert "bf16" in line


def test_a_missing_value_is_named(capfd):
    assert "--batch-size" in refused(["--batch-size"], capfd)


def test_a_user_error_is_its_message(capfd):
    assert error_line(UserError("--gamma is -1: choose 0 or more"), capfd) == "error: --gamma is -1: choose 0 or more"


def test_a_value_error_names_the_debug_flag(capfd):
    assert error_line(ValueError("gamma is -1"), capfd) == "error: gamma is -1 (--debug shows where)"


def test_a_message_of_several_lines_becomes_one(capfd):
    assert error_line(UserError("first\n  second\n\nthird"), capfd) == "error: first second third"


def test_a_loader_workers_error_is_its_last_line(capfd):
    def main(config):  # what torch does with an error in a worker
        try:
            raise UserError("shard 7.tar is missing: mend --train-data")
        except UserError:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    assert stderr_line(main, capfd) == "error: shard 7.tar is missing: mend --train-data"


def test_a_missing_file_is_named(capfd):
    line = error_line(FileNotFoundError(errno.ENOENT, "No such file or directory", "shards/0.tar"), capfd)
    assert line == "error: No such file or directory at shards/0.tar"


def test_no_permission_names_the_path_and_a_remedy(capfd):
    line = error_line(PermissionError(errno.EACCES, "Permission denied", "runs/x"), capfd)
    assert line == "error: Permission denied at runs/x: change its permissions, or choose another path"


def test_a_read_only_disk_is_no_permission(capfd):
    assert "choose another path" in error_line(OSError(errno.EROFS, "Read-only file system", "runs/x"), capfd)


def test_a_full_disk_names_the_path_and_a_remedy(capfd):
    line = error_line(OSError(errno.ENOSPC, "No space left on device", "runs/x"), capfd)
    assert line.startswith("error: no space left on the disk at runs/x: free some, or choose another --output-dir")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_full_disk_is_recognised_in_the_errors_of_torch_and_python(capfd):
    def torch_save(config):
        torch.save(torch.zeros(1_000_000), "/dev/full")

    def python_write(config):
        with open("/dev/full", "w") as file:
            file.write("a" * 100_000)

    for main in (torch_save, python_write):
        assert stderr_line(main, capfd).startswith("error: no space left on the disk")


def test_a_full_disk_is_recognised_in_the_error_of_safetensors(capfd):
    class SafetensorError(Exception):
        pass

    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert error_line(SafetensorError(message), capfd).startswith("error: no space left on the disk")


def test_a_full_gpu_names_the_batch_size(capfd):
    message = "CUDA out of memory. Tried to allocate 2.00 GiB."
    line = error_line(torch.OutOfMemoryError(message), capfd)
    assert line == "error: CUDA out of memory. Tried to allocate 2.00 GiB: lower --batch-size"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OfflineModeIsEnabled("Cannot reach the Hub"), "HF_HUB_OFFLINE"),
        (LocalEntryNotFoundError("not in the cache"), "HF_HUB_OFFLINE"),
        (EntryNotFoundError("no such file"), "check the name"),
        (cli.WebError("connection refused"), "HF_HUB_OFFLINE"),
    ],
)
def test_the_hubs_errors_carry_a_remedy(error, remedy, capfd):
    assert remedy in error_line(error, capfd)


def test_a_download_without_a_network_names_a_remedy(capfd):
    line = stderr_line(lambda config: huggingface_hub.hf_hub_download("org/model", "config.json"), capfd)
    assert "local-dir:PATH" in line


def test_a_hub_error_inside_a_runtime_error_is_recognised(capfd):
    def main(config):  # what open_clip does
        try:
            huggingface_hub.hf_hub_download("org/model", "config.json")
        except OSError as error:
            raise RuntimeError("Failed to download weights for 'openai'") from error

    assert stderr_line(main, capfd).startswith("error: Failed to download weights for 'openai': go online")


def test_debug_shows_the_traceback_before_the_line(capfd):
    code, lines = outcome(raising(UserError("gamma")), ["--debug"], capfd)
    assert code == 2
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "error: gamma"


def test_a_bug_is_not_hidden():
    for bug in (RuntimeError("shape"), KeyError("x"), AssertionError("never")):
        with pytest.raises(type(bug)):
            cli.run(raising(bug), Config, [])


def test_other_ranks_prefix_their_line(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert error_line(UserError("gamma"), capfd) == "[rank 3] error: gamma"


def test_rank_0_has_no_prefix(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert error_line(UserError("gamma"), capfd) == "error: gamma"


def test_ctrl_c_is_exit_code_130(capfd):
    assert outcome(raising(KeyboardInterrupt()), [], capfd) == (130, ["interrupted"])


def test_a_broken_pipe_that_is_not_stdout_is_an_error(capfd):
    assert error_line(BrokenPipeError(errno.EPIPE, "Broken pipe"), capfd) == "error: Broken pipe"


SCRIPT = """
    import signal, sys, time
    from dataclasses import dataclass
    from gkl_vl import cli

    @dataclass(frozen=True, kw_only=True)
    class Config:
        mode: str = "many lines"
        debug: bool = False

    def main(config):
        if config.mode == "wait":
            # background processes of a shell, and their children, ignore SIGINT
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("ready", flush=True)
            time.sleep(60)
        for line in range(1 if config.mode == "one line" else 200_000):
            print(line)

    cli.run(main, Config)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


def start(script, *argv) -> subprocess.Popen:
    command = [sys.executable, str(script), *argv]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_closed_stdout_ends_the_script_silently(script):
    with start(script) as process:
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_stdout_closed_before_a_short_output_ends_the_script_silently(script):
    with start(script, "--mode", "one line") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_real_sigint_ends_a_real_script_in_one_line(script):
    with start(script, "--mode", "wait") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "interrupted\n"
    assert process.returncode == 130


def test_a_real_sigterm_ends_a_real_script_in_one_line(script):
    with start(script, "--mode", "wait") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read() == "terminated by SIGTERM\n"
    assert process.returncode == 143


def test_sigterm_cleans_up_once_and_is_what_it_was_afterwards(capfd):
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []

    def main(config: Config) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal must end this")
        finally:
            cleaned.append(signal.getsignal(signal.SIGTERM))

    assert outcome(main, [], capfd) == (143, ["terminated by SIGTERM"])
    assert cleaned == [signal.SIG_DFL]  # a second one kills
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_value_out_of_bounds_never_reaches_the_script(capfd):
    assert refused(["--batch-size", "0"], capfd) == "error: --batch-size 0 must be at least 1"
    assert refused(["--train-data", ""], capfd) == "error: --train-data is an empty text: give a value, or leave it out"


def test_a_terminal_without_utf8_gets_the_same_line(script):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(script), "--moed", "x"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        "error: Unrecognized options: --moed, x; Perhaps you meant: --mode STR (--help lists the flags)\n"
    )


@pytest.mark.parametrize(
    "words, expected",
    [(["--columns", "filepath"], "STR STR, not ['filepath']"), (["--steps", "x"], "INT, not ['x']")],
)
def test_a_value_of_another_kind_is_refused_without_markup(words, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Optional, words)
    assert stop.value.code == 2
    assert f"error: Error parsing {words[0]}: expected {expected} (--help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "names", "steps"),
    [
        ("--names a --names b", ("a", "b"), None),
        ("--names a b --steps 1 --names=c --steps 2", ("a", "b", "c"), 2),
        ("--steps 3 --names a", ("a",), 3),
        ("--names", (), None),
        ("", ("one",), None),
    ],
)
def test_a_list_that_is_given_twice_is_joined_and_a_number_is_replaced(words, names, steps):
    config = cli.parse(Lists, words.split())
    assert config.group.names == names and config.steps == steps


@dataclass(frozen=True, kw_only=True)
class Group:
    names: tuple[str, ...] = ("one",)
    """Names."""


@dataclass(frozen=True, kw_only=True)
class Lists:
    group: Annotated[Group, tyro.conf.arg(name="")] = Group()
    steps: int | None = None
    """Steps."""


@dataclass(frozen=True, kw_only=True)
class Optional:
    columns: tuple[str, str] | None = None
    """Columns."""
    steps: int | None = None
    """Steps."""
