"""Embeddings of evaluation sets and texts under a CLIP, zero-shot classifiers, and logits of image classifiers.

Each image and each distinct text is embedded once. Process p of P embeds batches p, p + P, p + 2P, ...: a batch has the
same images for every P, so the embeddings are the same to the bit. All processes read all labels and captions, which
are small.

Axis letters: n = images, m = texts, C = classes, d = embedding.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from gkl_vl import disk_cache
from gkl_vl.data.classes import keys_of, listed
from gkl_vl.data.images import DECODE_RULES, BrokenImage
from gkl_vl.data.prompts import TEMPLATES_FILE, Templates
from gkl_vl.data.views import Views
from gkl_vl.data.workers import end_with_parent, worker_batches
from gkl_vl.distributed import rank, sum_across_processes, world_size
from gkl_vl.errors import UserError
from gkl_vl.evaluation.sets import BenchmarkSet
from gkl_vl.evaluation.sources import Record, Target
from gkl_vl.losses.gkl import upcast
from gkl_vl.models.classifiers import Classifier
from gkl_vl.models.clip import Clip
from gkl_vl.models.fingerprint import add_clip
from gkl_vl.models.modes import evaluating
from gkl_vl.models.towers import parameter_counts


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """A CLIP and how to run it."""

    clip: Clip
    """Its towers must be on `device`. They run in eval mode; their modes are restored, and no RNG advances."""
    device: torch.device | str = "cpu"
    batch_size: int = 64
    """Images, or texts, per forward pass of a process."""
    num_workers: int = 0
    """Worker processes that decode images; 0 = decode in this process."""
    amp: bool = False
    """Autocast: fp16 on a GPU, bf16 on a CPU, as CLIP_benchmark does by default."""
    max_broken: float = 0.001
    """Share of a set's images that may fail to decode; these are excluded and counted. A larger share is an error."""
    cache: Path | None = None
    """Folder of cached embeddings; None = no cache. Keys are hashes: of `fingerprint`, and of the rules of decoding and
    every image's bytes, in order, or of the shape and values of the tokens."""
    alone: bool = False
    """Only this one of several processes calls: it does all the work, without collectives."""
    progress: bool = False
    """Progress bars on a terminal."""

    @property
    def fingerprint(self) -> bytes:
        """Hash of everything that determines the embeddings of an image or of tokens, computed at each call: weights,
        architecture, preprocessing, versions (`models/fingerprint.py`), device type and amp.

        Not the batch size, which changes the rounding alone.
        """
        digest = hashlib.sha256(f"{torch.device(self.device).type} {self.amp}".encode())
        add_clip(digest, self.clip)
        return digest.digest()

    @cached_property
    def cost(self) -> dict[str, float]:
        """Numbers of parameters, and the image tower's milliseconds per image on this machine, in batches of 64."""
        return {
            **parameter_counts(self.clip.towers),
            "ms_per_image": milliseconds_per_image(clip=self.clip, device=self.device),
        }

    @property
    def part(self) -> tuple[int, int]:
        """(rank, number of processes) of the processes that share the work."""
        return (0, 1) if self.alone else (rank(), world_size())

    def joined(self, local: Tensor) -> Tensor:
        """Merges the rows of all processes: each passes the full tensor, with 0 in the rows that it did not compute."""
        return local if self.alone else sum_across_processes(local)  # all ranks

    def is_with_all(self, stored: dict[str, Tensor] | None) -> bool:
        """Whether `stored` is in the cache of every process: cache folders may differ between machines."""
        return int(self.joined(torch.tensor(int(stored is not None)))) == self.part[1]


@dataclass(frozen=True)
class EmbeddedImages:
    """Embeddings of a set in its order, without the images that could not be decoded."""

    rows: Float[Tensor, "n d"]
    """L2-normalised, fp32 or wider, on the CPU."""
    targets: dict[Target, list]
    """Labels, 0/1 rows or captions of the embedded images."""
    broken: int
    """Number of images that could not be decoded."""


def embed_images(embedder: Embedder, dataset: BenchmarkSet, *targets: Target) -> EmbeddedImages:
    """Embeds the images of a set, and reads their `targets`. All processes take part.

    Raises:
        UserError: an unusable sample, too many images that cannot be decoded, embeddings that are not finite.
    """
    if embedder.batch_size < 1:
        raise UserError(f"batch_size={embedder.batch_size} must be 1 or more")
    digest = None
    if embedder.cache is not None:
        digest = hashlib.sha256(embedder.fingerprint + f"rules {DECODE_RULES}".encode())
    targets_of = []
    for record in dataset.records(*targets):
        targets_of.append(record.targets)
        if digest is not None:
            content = record.read()
            digest.update(len(content).to_bytes(8, "big") + content)
    path = None if embedder.cache is None or digest is None else embedder.cache / _file("images", digest)
    stored = None if path is None else disk_cache.read(path)
    if path is None or not embedder.is_with_all(stored):
        rows, whole = _embed_batches(embedder, dataset, len(targets_of))
        stored = {"rows": rows, "whole": whole}
        if path is not None and embedder.part[0] == 0:
            disk_cache.write(path, stored)
    assert stored is not None  # by is_with_all
    whole = stored["whole"].bool().tolist()
    broken = len(whole) - sum(whole)
    if broken > embedder.max_broken * len(whole) or not any(whole):
        _raise_first_broken(dataset, broken, len(whole), embedder.max_broken)
    rows = stored["rows"][stored["whole"].bool()]
    _require_finite(embedder.clip, rows, "image")
    kept: dict[Target, list] = {
        target: [of_image[target] for of_image, decoded in zip(targets_of, whole, strict=True) if decoded]
        for target in targets
    }
    return EmbeddedImages(rows, kept, broken)


def _embed_batches(embedder: Embedder, dataset: BenchmarkSet, images: int) -> tuple[Tensor, Tensor]:
    """Embeddings of all images, and a mask: 1 if an image could be decoded, else 0 and its embedding is 0."""
    rows, whole = torch.zeros(images, embedder.clip.embed_dim), torch.zeros(images, dtype=torch.uint8)
    batches = _Batches(dataset, embedder.clip.image_transform(), embedder.batch_size, *embedder.part)
    # Its own generator: a DataLoader draws a seed, and evaluation must not advance training's RNG.
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=embedder.num_workers,
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),
    )
    with (
        _bar("image", embedder, total=images) as bar,
        evaluating(embedder.clip.towers),
        torch.inference_mode(),
        _precision(embedder),
    ):
        for batch in worker_batches(loader):
            if isinstance(batch, UserError):
                raise batch
            indices, pixels, count = batch
            if len(indices):
                embeddings = embedder.clip.towers.encode_image(pixels.to(embedder.device))
                rows[indices] = F.normalize(upcast(embeddings), dim=-1).cpu()
                whole[indices] = 1
            bar.update(count * embedder.part[1])
    return embedder.joined(rows), embedder.joined(whole)


@dataclass
class _Batches(IterableDataset):
    """Batches of this process, in order: (indices of the images that could be decoded, their pixels, images read).

    Process b mod P takes batch b. Its workers take its batches in turn, which is the order in which a loader polls
    them, so the order is kept; all workers are used even for a set of one shard.
    """

    dataset: BenchmarkSet
    transform: Any
    batch_size: int
    process: int
    processes: int

    def __iter__(self) -> Iterator[tuple[Int[Tensor, " b"], Tensor, int] | UserError]:
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        first, step = self.process + worker_id * self.processes, self.processes * workers
        try:
            for index, records in enumerate(_batched(self.dataset.records(), self.batch_size)):
                if index % step == first:
                    yield self._decoded(index * self.batch_size, records)
        except UserError as error:
            yield error  # if raised here, the loader would turn it into a worker's traceback

    def _decoded(self, start: int, records: list[Record]) -> tuple[Int[Tensor, " b"], Tensor, int]:
        indices, pixels = [], []
        for index, record in enumerate(records, start):
            try:
                pixels.append(self.transform(record.decode()))
                indices.append(index)
            except BrokenImage:
                pass  # its index is missing, which the caller counts
        stacked = torch.stack(pixels) if pixels else torch.empty(0)
        return torch.tensor(indices, dtype=torch.int64), stacked, len(records)


def _batched(records: Iterable[Record], batch_size: int) -> Iterator[list[Record]]:
    records = iter(records)
    while batch := list(islice(records, batch_size)):
        yield batch


def _raise_first_broken(dataset: BenchmarkSet, broken: int, images: int, share: float) -> None:
    for record in dataset.records():
        try:
            record.decode()
        except BrokenImage as error:
            counts = f"{broken} of {images} images cannot be decoded, and --max_broken allows a share of {share:g}"
            raise UserError(f"{counts}; the first: {error}") from error


def embed_texts(embedder: Embedder, texts: Sequence[str]) -> Float[Tensor, "m d"]:
    """L2-normalised embeddings of texts, fp32 or wider, on the CPU; equal texts are embedded once. All processes."""
    distinct = list(dict.fromkeys(texts))
    starts = range(0, len(distinct), embedder.batch_size)
    tokens = torch.cat([embedder.clip.tokenize(distinct[s : s + embedder.batch_size]) for s in starts])
    path = None
    if embedder.cache is not None:
        digest = hashlib.sha256(embedder.fingerprint + f"{tokens.dtype} {tuple(tokens.shape)}".encode())
        digest.update(tokens.numpy().tobytes())
        path = embedder.cache / _file("texts", digest)
    stored = None if path is None else disk_cache.read(path)
    if path is None or not embedder.is_with_all(stored):
        stored = {"rows": _embed_tokens(embedder, tokens)}
        if path is not None and embedder.part[0] == 0:
            disk_cache.write(path, stored)
    assert stored is not None  # by is_with_all
    _require_finite(embedder.clip, stored["rows"], "text")
    row_of = {text: row for row, text in enumerate(distinct)}
    return stored["rows"][torch.tensor([row_of[text] for text in texts])]


def _embed_tokens(embedder: Embedder, tokens: Int[Tensor, "m length"]) -> Float[Tensor, "m d"]:
    rows = torch.zeros(len(tokens), embedder.clip.embed_dim)
    process, processes = embedder.part
    size = embedder.batch_size
    with (
        _bar("text", embedder, total=len(tokens)) as bar,
        evaluating(embedder.clip.towers),
        torch.inference_mode(),
        _precision(embedder),
    ):
        for start in range(process * size, len(tokens), processes * size):
            batch = tokens[start : start + size]
            embeddings = embedder.clip.towers.encode_text(batch.to(embedder.device))
            rows[start : start + size] = F.normalize(upcast(embeddings), dim=-1).cpu()
            bar.update(len(batch) * processes)
    return embedder.joined(rows)


def _file(kind: str, digest: Any) -> str:
    return f"{kind}_{digest.hexdigest()[:32]}.safetensors"


def _bar(unit: str, embedder: Embedder, *, total: int) -> tqdm:
    shown = embedder.progress and embedder.part[0] == 0
    return tqdm(desc=f"{unit}s", unit=unit, total=total, leave=False, disable=None if shown else True)


def _precision(embedder: Embedder) -> torch.autocast:
    return torch.autocast(torch.device(embedder.device).type, enabled=embedder.amp)


def _require_finite(clip: Clip, rows: Tensor, tower: str) -> None:
    # Comparisons with nan are false, so a broken model would score like a perfect one, or like chance.
    if not rows.isfinite().all():
        raise UserError(f"the {tower} tower of {clip.name!r} returns embeddings that are not finite: check its weights")


def milliseconds_per_image(*, clip: Clip, device: torch.device | str, batch_size: int = 64, repeats: int = 5) -> float:
    """Time per image of the image tower: median of `repeats` batches after one warm-up. A rough estimate."""
    device = torch.device(device)
    pixels = clip.prepare(
        torch.zeros(batch_size, 3, clip.image_size, clip.image_size, dtype=torch.uint8, device=device)
    )
    seconds = []
    with evaluating(clip.towers), torch.inference_mode():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            clip.towers.encode_image(pixels)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return 1000 * sorted(seconds[1:])[repeats // 2] / batch_size


def zero_shot_classifier(
    embedder: Embedder, *, classnames: Sequence[str], templates: Templates
) -> Float[Tensor, "C d"]:
    """One unit vector per class: the normalised mean of the normalised embeddings of its prompts.

        w_c = z / |z|,  z = mean_t e(prompt_t(c)) / |e(prompt_t(c))|

    Args:
        templates: prompts with {c} for the class name, or {class name: [prompts]} (CuPL, arXiv 2209.03320), matched by
            name as in data/classes.py; classes that are not in `classnames` are ignored.

    Source: CLIP_benchmark 1.6.2, `metrics/zeroshot_classification.py::zero_shot_classifier`; the same as
    open_clip's `build_zero_shot_classifier`, transposed.

    Raises:
        UserError: a template without {c}, a class without prompts.
    """
    prompts = _prompts(classnames, templates)
    text = embed_texts(embedder, [prompt for of_class in prompts for prompt in of_class])
    means = [of_class.mean(dim=0) for of_class in text.split([len(of_class) for of_class in prompts])]
    return F.normalize(torch.stack(means), dim=-1)


def _prompts(classnames: Sequence[str], templates: Templates) -> list[list[str]]:
    """The prompts of each class."""
    if isinstance(templates, dict):
        of_classes = [templates[key] if key is not None else [] for key in keys_of(classnames, templates)]
        if lacking := [name for name, prompts in zip(classnames, of_classes, strict=True) if not prompts]:
            raise UserError(
                f"the prompts have no entry for the class {lacking[0]!r} ({len(lacking)} of {len(classnames)} classes; "
                f"they have {listed(list(templates))}): add one"
            )
        return of_classes
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"the template {template!r} has no place for the class name: write {{c}}")
    return [[template.replace("{c}", name) for template in templates] for name in classnames]


def class_weights(embedder: Embedder, dataset: BenchmarkSet) -> Float[Tensor, "C d"]:
    """`zero_shot_classifier` for a set's class names and templates.

    Raises:
        UserError: a set without class names or templates.
    """
    require_classes(dataset)
    assert dataset.classnames is not None and dataset.templates is not None  # by require_classes
    return zero_shot_classifier(embedder, classnames=dataset.classnames, templates=dataset.templates)


def require_classes(dataset: BenchmarkSet) -> None:
    """Raises: UserError for a set without class names or templates."""
    if dataset.kind in ("retrieval", "choice"):
        raise UserError(f"{dataset.name} is a {dataset.kind} set: it has no classes; use eval/retrieval.py")
    if not dataset.classnames and dataset.classes:
        form = f'{{"{dataset.name}": {{"{dataset.classes[0]}": "its name", ...}}}}'
        raise UserError(
            f"the classes of {dataset.name} are numbers ({listed(dataset.classes)}), which no prompt can use: give "
            f"names as --custom_classname_file, a JSON of {form}"
        )
    if not dataset.classnames:
        raise UserError(
            f"{dataset.name} has no classnames.txt: write one name per line, by label, or give --custom_classname_file"
        )
    if not dataset.templates:
        raise UserError(
            f"{dataset.name} has no {TEMPLATES_FILE}: write one prompt per line, {{c}} for the class name, or give "
            "--custom_template_file"
        )


def top_names(
    embedder: Embedder, *, images: Sequence[Image.Image], dataset: BenchmarkSet, k: int
) -> list[list[tuple[str, float]]]:
    """For each image, the k most probable class names of the set: (name, softmax of the scaled similarities).

    Runs in the calling process only, without collectives.
    """
    clip = embedder.clip
    classifier = class_weights(replace(embedder, alone=True), dataset)
    assert dataset.classnames is not None  # by class_weights
    with evaluating(clip.towers), torch.inference_mode():
        pixels = torch.stack([clip.image_transform()(image) for image in images]).to(embedder.device)
        image = upcast(clip.towers.encode_image(pixels)).cpu()
        scale = clip.towers.log_scale().exp().cpu()
        best = (scale * image @ classifier.T).softmax(dim=1).topk(min(k, len(classifier)), dim=1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[(dataset.classnames[c], p) for c, p in zip(*row, strict=True)] for row in rows]


@torch.inference_mode()
def predict(
    *, classifier: Classifier, views: Views, view: int, count: int, device: torch.device, batch_size: int = 256
) -> Float[Tensor, "n C"]:
    """Logits of one view of images 0 .. count - 1, on the CPU. The caller puts the model in evaluation mode."""
    starts = range(0, count, batch_size)
    ids = ((view, torch.arange(start, min(start + batch_size, count))) for start in starts)
    batches = tqdm(views.batches(ids), total=len(starts), desc="classify", leave=False, disable=None)
    return torch.cat([classifier.model(classifier.prepare(images.to(device))).float().cpu() for images in batches])
