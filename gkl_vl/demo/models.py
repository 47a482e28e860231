"""The CLIPs of the page: loaded, with their sizes and their times on this machine, one image or text at a time.

Axis letters: n = images or texts, d = embedding, h w = pixels.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from gkl_vl.errors import UserError
from gkl_vl.evaluation.embed import Embedder, embed_texts, milliseconds_per_image
from gkl_vl.losses.gkl import upcast
from gkl_vl.models.clip import comes_with_weights, holds_transformers_config, load_clip
from gkl_vl.models.modes import freeze
from gkl_vl.models.open_clip_weights import FOLDER_CONFIG
from gkl_vl.models.towers import parameter_counts

Role = Literal["student", "teacher"]
_REPEATS = 9


@dataclass(frozen=True, kw_only=True)
class DemoModel:
    """A CLIP with what the page shows of it."""

    role: Role
    title: str
    """Its name without the path before it."""
    embedder: Embedder
    parameters: int
    image_parameters: int
    ms_per_image: float
    """Of the image tower at batch 1, a median."""
    ms_per_text: float
    """Of tokenizer and text tower at batch 1, a median."""


def load_model(name: str, *, role: Role, device: torch.device, allow_pickle: bool = False) -> DemoModel:
    """Loads a CLIP to a device and measures it.

    Args:
        name: as in `load_clip`, or a folder that `load_clip` reads with a prefix (an exported student).

    Raises: UserError as `load_clip`, and for a name without weights.
    """
    if not comes_with_weights(name):
        raise UserError(
            f"model {name!r} is no folder and comes without weights: name a run folder, an exported folder, "
            "hf-hub:org/repo, transformers:org/repo or bundled"
        )
    clip = freeze(load_clip(_with_prefix(name), allow_pickle=allow_pickle))
    clip.towers.to(device)
    embedder = Embedder(clip=clip, device=device, alone=True)
    return DemoModel(
        role=role,
        title=_title(name),
        embedder=embedder,
        **parameter_counts(clip.towers),
        ms_per_image=milliseconds_per_image(clip=clip, device=device, batch_size=1, repeats=_REPEATS),
        ms_per_text=_median_ms(lambda: embed_texts(embedder, ["a photo of a cat"])),
    )


def best_device() -> torch.device:
    """The accelerator of this machine, else its CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else accelerator


def embed_images(model: DemoModel, images: Sequence[Image.Image]) -> Float[Tensor, "n d"]:
    """L2-normalised embeddings of decoded images, fp32 or wider, on the CPU."""
    clip = model.embedder.clip
    transform = clip.image_transform()
    pixels = torch.stack([transform(image) for image in images]).to(model.embedder.device)
    with torch.inference_mode():
        rows = F.normalize(upcast(clip.towers.encode_image(pixels)), dim=-1).cpu()
    if not rows.isfinite().all():  # comparisons with nan are false: the order would look like a result
        raise UserError(f"{model.title} returns image embeddings that are not finite: check its weights")
    return rows


def timed(compute: Callable[[], Any]) -> tuple[Any, float]:
    """What `compute` returns, and its milliseconds. Its result must be on the CPU, so that a GPU has finished."""
    started = time.perf_counter()
    result = compute()
    return result, 1000 * (time.perf_counter() - started)


def _median_ms(compute: Callable[[], Any]) -> float:
    compute()  # the first call is slower
    return sorted(timed(compute)[1] for _ in range(_REPEATS))[_REPEATS // 2]


def _with_prefix(name: str) -> str:
    """The name of an exported folder with the prefix of its format; other names as they are."""
    folder = Path(name)
    if (folder / FOLDER_CONFIG).is_file():
        return f"local-dir:{name}"
    return f"transformers:{name}" if holds_transformers_config(folder) else name


def _title(name: str) -> str:
    path = name.removeprefix("local-dir:").removeprefix("transformers:")
    if not Path(path).is_dir():
        return name.partition(":")[2] or name
    folder = Path(path).resolve()
    return folder.parent.name if folder.name == "model" else folder.name
