"""Weight files: downloads from the Hub, and the check against pickles."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from gkl_vl.errors import UserError, first_line


def refuse_pickle(path: str | Path, *, allow_pickle: bool) -> None:
    """Raises: UserError for a file that is not safetensors, unless `allow_pickle`."""
    if Path(path).suffix != ".safetensors" and not allow_pickle:
        raise UserError(f"{path} is a pickle, not safetensors: convert it, or pass --allow-pickle if you trust it")


def fetch(repo: str, *, files: Sequence[str], pickles: Sequence[str], allow_pickle: bool) -> Path:
    """Downloads a Hub repository unless it is cached, and returns its local folder.

    Args:
        files: patterns of the files to download.
        pickles: further patterns, used only with `allow_pickle`.

    Raises: UserError offline, for an unknown repository, without access.
    """
    try:
        return Path(snapshot_download(repo, allow_patterns=[*files, *(pickles if allow_pickle else ())]))
    except Exception as error:  # offline, unknown repository or no access: the client's message names the cause
        raise UserError(
            f"the Hub repository {repo!r} could not be fetched ({first_line(error)}): "
            "check the name and the connection, or download it and write local-dir:path"
        ) from error
