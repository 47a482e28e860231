"""Pushes an exported folder to the Hub, in one commit.

    python -m gkl_vl.export.push runs/NAME --to org/name
    python -m gkl_vl.export.push runs/NAME/model --to org/name --private --revision trial

The repository and the branch are created where they do not exist. The commit replaces an earlier export in the same
place whole; other files in the repository are kept. HF_ENDPOINT and HF_TOKEN are the client's.
"""

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from gkl_vl import cli
from gkl_vl.atomic import json_text
from gkl_vl.errors import UserError, causes, first_line
from gkl_vl.export.cards import EXAMPLE_NAME, PICTURE_NAME, for_hub
from gkl_vl.export.hub import (
    CARD_NAME,
    CLASSIFIER_CONFIG_NAME,
    CONFIG_NAME,
    TRANSFORMERS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    holds_model,
)
from gkl_vl.models import onnx
from gkl_vl.provenance import without_secrets

EXPORTED = (
    *(CONFIG_NAME, WEIGHTS_NAME, CLASSIFIER_CONFIG_NAME, TRANSFORMERS_WEIGHTS_NAME, PICTURE_NAME, EXAMPLE_NAME),
    *("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model"),
)
"""Files that exports write, beside those in onnx/. What the pushed folder lacks of them is deleted by its commit."""

_BRANCH = re.compile(r"\w[\w./-]*(?<![./])")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pushes an exported folder to the Hub."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run folder, or its model/."""
    to: str
    """Hub repository, org/name."""
    private: bool = False
    """Create the repository as a private one."""
    revision: str | None = None
    """Branch to push to, which is created if it does not exist; None = main."""
    debug: bool = False
    """Print the traceback of an error."""


def check_target(repo_id: str, revision: str | None = None, *, token: str | None = None) -> None:
    """Checks without network that something can be pushed to this repository and branch.

    Raises:
        UserError: malformed name or branch, no token, offline mode.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"repository name {repo_id!r} is malformed: {first_line(error)}") from error
    if repo_id.count("/") != 1:
        raise UserError(f"repository name {repo_id!r} has no owner: write org/name")
    if revision is not None and (not _BRANCH.fullmatch(revision) or ".." in revision or "//" in revision):
        raise UserError(f"--revision {revision!r} is no name of a branch: use letters, digits, '-', '_', '.' and '/'")
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        raise UserError(f"--revision {revision!r} is a commit, which cannot be added to: name a branch")
    if _token(token) is None:
        raise UserError(f"no Hub token to push {repo_id!r} with: run `hf auth login` or set HF_TOKEN")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"HF_HUB_OFFLINE is set, so {repo_id!r} cannot be pushed: unset it, or push later")


def check_access(repo_id: str, *, token: str | None = None) -> None:
    """Asks the Hub whether the token may write to the owner of a repository, before hours are spent on a model.

    What a fine-grained token may do is known to the Hub alone, when it is used.

    Raises:
        UserError: no connection, a token that is invalid, that can only read, or is of someone else.
    """
    try:
        account = HfApi(token=token).whoami()
    except Exception as error:  # see `push_to_hub`
        remedy = _remedy(error, repo_id)
        line = f"the Hub does not tell whether {repo_id!r} can be pushed ({_reason(error, token)}): {remedy}"
        raise UserError(f"{line}, or leave out --push-to-hub and push the run folder later") from _quotable(
            error, token
        )
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    user, owner = account.get("name", ""), repo_id.split("/")[0]
    organisations = [org["name"] for org in account.get("orgs", []) if org.get("roleInOrg") != "read"]
    if role == "read":
        raise UserError(f"the Hub token of {user!r} can only read: create one with write access to push {repo_id!r}")
    if role == "write" and owner.lower() not in [name.lower() for name in (user, *organisations)]:
        known = ", ".join([user, *organisations])
        raise UserError(f"the Hub token of {user!r} may not write to {repo_id!r}: use one of {known} as its owner")


def push_to_hub(
    *, folder: Path, repo_id: str, private: bool = False, revision: str | None = None, token: str | None = None
) -> str:
    """Uploads an exported folder in one commit and returns the URL of the repository, which is made if need be.

    A broken upload leaves the repository as it was, and can be repeated. The card, and the tokenizer's name, by which
    open_clip loads that of a Hub model, become those of the repository on the way; the folder stays as it is. Hidden
    files are not uploaded.

    Args:
        private: make a new repository private.
        revision: a branch, which is made from main if it does not exist; None = main.
        token: None = the client's own, HF_TOKEN or that of `hf auth login`.

    Raises:
        UserError: malformed name, no token, offline, a folder without a model, `private` for a public repository, a
            refusal of the Hub, a lost connection. The folder is kept.
    """
    check_target(repo_id, revision, token=token)
    if not holds_model(folder):
        raise UserError(
            f"{folder} holds no {CONFIG_NAME}, no CLIP of transformers, no classifier: push the model/ folder of a run"
        )
    try:
        return without_secrets(_upload(HfApi(token=token), folder, repo_id, private, revision))
    except UserError:
        raise
    # The client's HTTP library depends on its version (requests, httpx, httpx2), and the errors of a lost connection
    # have no common base class.
    except Exception as error:
        again = ["python", "-m", "gkl_vl.export.push", str(folder), "--to", repo_id]
        again += ["--private"] * private + ([] if revision is None else ["--revision", revision])
        line = f"pushing to {repo_id!r} failed ({_reason(error, token)}): {_remedy(error, repo_id)}"
        raise UserError(f"{line}, then run {shlex.join(again)}") from _quotable(error, token)


def _upload(api: HfApi, folder: Path, repo_id: str, private: bool, revision: str | None) -> str:
    """One commit; the client's `upload_folder` makes several of a large or slow one."""
    url = api.create_repo(repo_id, private=True if private else None, exist_ok=True)
    there = api.model_info(repo_id)
    if private and not there.private:
        raise UserError(f"{repo_id!r} exists and is public: make it private in its settings, or push without --private")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.model_info(repo_id, revision=revision)
    files = _files(folder, repo_id, revision)
    stale = _exported(file.rfilename for file in there.siblings or ())
    api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in stale if name not in files),
        ],
        commit_message="Upload model with gkl-vl",
        revision=revision,
        parent_commit=there.sha,  # the list of files is that of this commit
    )
    return str(url)


def _exported(paths: Iterable[str]) -> list[str]:
    """Which of the files of a repository an earlier export wrote."""
    paths = list(paths)
    in_onnx = f"{onnx.SUBFOLDER}/" if f"{onnx.SUBFOLDER}/{onnx.CONFIG_NAME}" in paths else None
    return [path for path in paths if path in EXPORTED or (in_onnx and path.startswith(in_onnx))]


def _files(folder: Path, repo_id: str, revision: str | None) -> dict[str, Path | bytes]:
    """Path in the repository -> what is uploaded."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in paths}
    files = {name: path for name, path in files.items() if not any(part.startswith(".") for part in name.split("/"))}
    if CARD_NAME in files:
        card = (folder / CARD_NAME).read_text(encoding="utf-8")
        files[CARD_NAME] = for_hub(card, repo_id, revision).encode()
    if CONFIG_NAME in files:
        config = json.loads((folder / CONFIG_NAME).read_text())
        text_cfg = config["model_cfg"]["text_cfg"]
        # Without the key open_clip uses CLIP's BPE, and any tokenizer files in the folder are for transformers.
        if text_cfg.get("hf_tokenizer_name"):
            text_cfg["hf_tokenizer_name"] = repo_id
            files[CONFIG_NAME] = json_text(config, indent=2).encode()
    return files


# ---- errors of the client


def _remedy(error: Exception, repo_id: str) -> str:
    status = next((e.response.status_code for e in causes(error) if isinstance(e, HfHubHTTPError)), None)
    if status == 401:
        return "the token is not valid, create a new one and set HF_TOKEN"
    if status in (403, 404):
        return f"the token may not write to {repo_id}, use one with write access or another name"
    if status == 412:
        return "somebody else has committed in the meantime, look at their commit"
    if status == 429:
        return "too many requests, wait some minutes"
    return "check the connection and HF_ENDPOINT"


def _reason(error: Exception, token: str | None) -> str:
    """What the client and the server said, on one line and without the token."""
    texts = [first_line(error)]
    if isinstance(error, HfHubHTTPError):
        texts = [f"{error.response.status_code} {error.server_message or first_line(error)}"]
    elif error.__cause__ is not None:  # the client wraps the error of an upload in one that names the file
        texts.append(first_line(error.__cause__))
    return _hidden(": ".join(" ".join(text.split()).rstrip(".:") for text in texts), token)[:300]


def _quotable(error: Exception, token: str | None) -> Exception | None:
    """The error as the cause of another one; None where its text holds the token, which a traceback would print."""
    texts = [str(cause) for cause in causes(error)]
    return error if all(_hidden(text, token) == text for text in texts) else None


def _hidden(text: str, token: str | None) -> str:
    secret = _token(token)
    return without_secrets(text if secret is None else text.replace(secret, "***"))


def _token(token: str | None) -> str | None:
    return get_token() if token is None else token


def main(config: Config) -> None:
    """Pushes a folder and prints its address."""
    folder = config.folder
    if not holds_model(folder) and (folder / "model").is_dir():
        folder = folder / "model"
    url = push_to_hub(folder=folder, repo_id=config.to, private=config.private, revision=config.revision)
    print(f"Pushed: {url}")


if __name__ == "__main__":
    cli.run(main, Config)
