"""A CLIP as an encoder of mteb, for MIEB and MTEB: embeddings of images, of texts, and of images with a text.

Axis letters: n = inputs of a task, d = embedding.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from gkl_vl.data.images import DECODE_RULES, BrokenSample, decode
from gkl_vl.errors import UserError, first_line
from gkl_vl.evaluation.benchmark import file_safe
from gkl_vl.evaluation.embed import Embedder, embed_texts
from gkl_vl.losses.gkl import upcast
from gkl_vl.models.clip import Clip, comes_with_weights, load_clip
from gkl_vl.models.modes import evaluating
from gkl_vl.models.towers import parameter_counts

# mteb is optional and slow to import: its types are Any in the signatures, and their names are in the docstrings.


class MtebEncoder:
    """A CLIP with the interface of mteb's `EncoderProtocol`: `mteb.evaluate(MtebEncoder("runs/NAME"), tasks)`.

        image            e(x) / |e(x)|
        text             e(t) / |e(t)|
        image and text   the sum of the two

    Images are decoded as in the rest of this package (`data/images.py`), with the model's own preprocessing; texts pass
    its own tokenizer, without a prompt.

    Source: mteb 2.26, `models/models_protocols.py`. Its own encoders of CLIPs (`openclip_models.py`, `clip_models.py`)
    have the same sum, and no normalisation: linear probes, clusterings and the sum depend on it, cosines do not.
    """

    mteb_model_meta: Any
    """mteb's `ModelMeta`. Its revision, under which mteb stores results, is a hash of weights, preprocessing and
    versions when the encoder was built: a folder that was trained again is evaluated again."""

    def __init__(self, model: str | Clip, *, device: torch.device | str = "cpu", amp: bool = False):
        """Loads the model and moves it to the device.

        Args:
            model: a run folder or another name of `load_clip` that comes with weights, or a Clip.
            amp: autocast: fp16 on a GPU, bf16 on a CPU.

        Raises:
            UserError: mteb is not installed, a name without weights, and as `load_clip`.
        """
        _require_mteb()
        if isinstance(model, str) and not comes_with_weights(model):
            raise UserError(
                f"model {model!r} has random weights: name one that comes with weights, or pass load_clip(name, tag)"
            )
        clip = load_clip(model) if isinstance(model, str) else model
        clip.towers.to(device)
        self._embedder = Embedder(clip=clip, device=device, amp=amp, alone=True)
        self.mteb_model_meta = _model_meta(self._embedder, model if isinstance(model, str) else model.name)

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        batch_size: int = 32,
        show_progress_bar: bool = True,
    ) -> Float[Tensor, "n d"]:
        """Embeds the inputs of a task, in their order. mteb calls it, with its `encode_kwargs` except `precision`.

        Args:
            inputs: batches with the lists "image" (PIL images), "text", or both.
            task_metadata: `TaskMetadata` of the task, whose name is in messages.
            hf_split, hf_subset, prompt_type: part of the protocol; the embedding does not depend on them.
            batch_size: texts per forward pass; the batches of `inputs` are those of the images.

        Raises:
            UserError: inputs of another modality, an image that cannot be decoded, embeddings that are not finite.
        """
        task = f"{task_metadata.name}, split {hf_split}"
        embedder = replace(self._embedder, batch_size=batch_size, progress=show_progress_bar)
        images, texts = [], []
        bar = tqdm(inputs, desc="batches", leave=False, disable=None if show_progress_bar else True)
        with evaluating(embedder.clip.towers), torch.inference_mode():
            for batch in bar:
                if "image" in batch:
                    images.append(_embed_images(embedder, batch["image"], task))
                texts += batch.get("text", [])
        parts = [torch.cat(images)] if images else []
        parts += [embed_texts(embedder, texts)] if texts else []
        if not parts:
            raise UserError(f"{task} has neither images nor texts, and a CLIP embeds nothing else: leave it out")
        return torch.stack(parts).sum(dim=0)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of every row of one with every row of the other, which are arrays of numpy or torch."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of each row of one with the same row of the other."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def _require_mteb() -> None:
    try:
        import mteb.models.models_protocols  # noqa: F401  # from version 2 on
    except ImportError as error:
        raise UserError(
            f"MtebEncoder needs mteb ({first_line(error)}): pip install 'gkl-vl[mteb]', with Python 3.11 or later"
        ) from error


def _embed_images(embedder: Embedder, images: Sequence[Any], task: str) -> Float[Tensor, "n d"]:
    """Unit embeddings on the CPU, fp32 or wider. The caller sets evaluation and inference mode."""
    transform = embedder.clip.image_transform()
    try:
        pixels = torch.stack([transform(decode(image)) for image in images])
    except BrokenSample as error:
        raise UserError(f"{task}: an image cannot be decoded ({first_line(error)}): leave the task out") from error
    with torch.autocast(torch.device(embedder.device).type, enabled=embedder.amp):
        rows = embedder.clip.towers.encode_image(pixels.to(embedder.device))
    rows = F.normalize(upcast(rows), dim=-1).cpu()
    if not rows.isfinite().all():
        raise UserError(f"the image tower of {embedder.clip.name!r} returns embeddings that are not finite: check it")
    return rows


def _model_meta(embedder: Embedder, name: str) -> Any:
    """mteb's `ModelMeta`: what is known of any CLIP; training data, licence and languages are not."""
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    clip = embedder.clip
    return ModelMeta(
        loader=None,
        name=_mteb_name(name),
        revision=hashlib.sha256(embedder.fingerprint + f"rules {DECODE_RULES}".encode()).hexdigest()[:32],
        release_date=None,
        languages=None,
        n_parameters=parameter_counts(clip.towers)["parameters"],
        memory_usage_mb=None,
        max_tokens=clip.tokenize([""]).shape[1],
        embed_dim=clip.embed_dim,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction("cosine"),
        use_instructions=False,
        training_datasets=None,
        modalities=["image", "text"],
    )


def _mteb_name(name: str) -> str:
    """The name in mteb's form, ORGANISATION/MODEL: a Hub repository's own, else gkl_vl/NAME."""
    prefix, _, repository = name.partition(":")
    if prefix in ("hf-hub", "transformers") and repository.count("/") == 1 and not Path(repository).is_dir():
        return repository
    return f"gkl_vl/{file_safe(name)}"
