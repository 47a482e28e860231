"""A CLIP and an evaluation set -> embeddings: each image and each text once, by all processes together.

Batches of images go round the processes, a batch to each, whatever their number, so that a batch holds the same images
and gives the same bits as in one process. Labels and captions are read by everybody; they are small.

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

import PIL
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from gkl_vl import disk_cache
from gkl_vl.data.files import BrokenImage
from gkl_vl.data.prompts import TEMPLATES_FILE, Templates
from gkl_vl.data.views import Views
from gkl_vl.distributed import rank, sum_across_processes, world_size
from gkl_vl.errors import UserError
from gkl_vl.evaluation.sets import BenchmarkSet
from gkl_vl.evaluation.sources import Record, Target
from gkl_vl.losses.gkl import upcast
from gkl_vl.models.classifiers import Classifier
from gkl_vl.models.clip import Clip
from gkl_vl.models.fingerprint import add_clip
from gkl_vl.models.modes import evaluating


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """A CLIP at work."""

    clip: Clip
    """Its towers are on `device`; they run in eval mode and come back in the mode they were in; no RNG moves."""
    device: torch.device | str = "cpu"
    batch_size: int = 64
    """Images, or texts, per forward pass of a process."""
    num_workers: int = 0
    """Processes that decode images; 0 = this one."""
    amp: bool = False
    """Autocast: fp16 on a GPU, bf16 on a CPU, as CLIP_benchmark does by default."""
    max_broken: float = 0.001
    """Share of a set's images that may fail to decode. They are left out and counted; more of them are an error."""
    cache: Path | None = None
    """Folder to keep embeddings in, under a hash of model, preprocessing and images or texts; None = keep none."""
    alone: bool = False
    """Only this one of several processes asks."""
    progress: bool = False
    """Bars, on a terminal."""

    @cached_property
    def fingerprint(self) -> bytes:
        """Of what the model says: its weights, architecture and preprocessing, and how it computes."""
        digest = hashlib.sha256(f"{torch.device(self.device).type} {self.amp}".encode())
        add_clip(digest, self.clip)
        return digest.digest()

    @cached_property
    def cost(self) -> dict[str, float]:
        """Parameters, and milliseconds of the image tower per image on this machine, in batches of 64."""
        towers = self.clip.towers
        return {
            "parameters": sum(p.numel() for p in towers.parameters()),
            "image_parameters": sum(p.numel() for p in towers.image_parameters()),
            "ms_per_image": milliseconds_per_image(clip=self.clip, device=self.device),
        }

    @property
    def part(self) -> tuple[int, int]:
        """My number among the processes that share the work, and theirs."""
        return (0, 1) if self.alone else (rank(), world_size())

    def joined(self, mine: Tensor) -> Tensor:
        """Everybody's rows; where a row is another's, mine is 0."""
        return mine if self.alone else sum_across_processes(mine)  # all ranks

    def is_with_all(self, stored: dict[str, Tensor] | None) -> bool:
        """Whether every process found it in its cache: folders may differ between machines."""
        return int(self.joined(torch.tensor(int(stored is not None)))) == self.part[1]


@dataclass(frozen=True)
class EmbeddedImages:
    """Of a set, in its order, without the images that could not be decoded."""

    rows: Float[Tensor, "n d"]
    """L2-normalised, fp32 or wider, on the CPU."""
    targets: dict[Target, list]
    """Labels, captions, 0/1 by class."""
    broken: int
    """Images that could not be decoded."""


def embed_images(embedder: Embedder, dataset: BenchmarkSet, *targets: Target) -> EmbeddedImages:
    """Embeddings of a set's images, with what it says of them.

    Raises:
        UserError: an unusable sample, too many images that cannot be decoded, embeddings that are not finite.
    """
    if embedder.batch_size < 1:
        raise UserError(f"batch_size={embedder.batch_size} must be 1 or more")
    digest = None
    if embedder.cache is not None:
        digest = hashlib.sha256(embedder.fingerprint + PIL.__version__.encode())
    said = []
    for record in dataset.records(*targets):
        said.append(record.targets)
        if digest is not None:
            content = record.read()
            digest.update(len(content).to_bytes(8, "big") + content)
    path = None if embedder.cache is None or digest is None else embedder.cache / _file("images", digest)
    stored = None if path is None else disk_cache.read(path)
    if path is None or not embedder.is_with_all(stored):
        rows, whole = _embed_batches(embedder, dataset, len(said))
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
        target: [of[target] for of, ok in zip(said, whole, strict=True) if ok] for target in targets
    }
    return EmbeddedImages(rows, kept, broken)


def _embed_batches(embedder: Embedder, dataset: BenchmarkSet, images: int) -> tuple[Tensor, Tensor]:
    """Embeddings of all images, and 1 for those that could be decoded; the others' are 0."""
    rows, whole = torch.zeros(images, embedder.clip.embed_dim), torch.zeros(images, dtype=torch.uint8)
    batches = _Batches(dataset, embedder.clip.image_transform(), embedder.batch_size, *embedder.part)
    # Its own generator: a DataLoader draws a seed, and evaluation must not move training's RNG.
    loader = DataLoader(batches, batch_size=None, num_workers=embedder.num_workers, generator=torch.Generator())
    with (
        _bar("image", embedder, total=images) as bar,
        evaluating(embedder.clip.towers),
        torch.inference_mode(),
        _precision(embedder),
    ):
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            numbers, pixels, count = batch
            if len(numbers):
                found = embedder.clip.towers.encode_image(pixels.to(embedder.device))
                rows[numbers] = F.normalize(upcast(found), dim=-1).cpu()
                whole[numbers] = 1
            bar.update(count * embedder.part[1])
    return embedder.joined(rows), embedder.joined(whole)


@dataclass
class _Batches(IterableDataset):
    """My batches in the order of the set: (numbers of the images that could be decoded, their pixels, images read).

    Batch b is process b mod P's, and of a process's batches its workers take one in turn; a loader asks its workers in
    turn, so the order stays, and all of them help where a set is one single shard.
    """

    dataset: BenchmarkSet
    transform: Any
    batch_size: int
    process: int
    processes: int

    def __iter__(self) -> Iterator[tuple[Int[Tensor, " b"], Tensor, int] | UserError]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        wanted, every = self.process + mine * self.processes, self.processes * workers
        try:
            for index, records in enumerate(_batched(self.dataset.records(), self.batch_size)):
                if index % every == wanted:
                    yield self._decoded(index * self.batch_size, records)
        except UserError as error:
            yield error  # raised here, it would reach the user as a worker's traceback

    def _decoded(self, start: int, records: list[Record]) -> tuple[Int[Tensor, " b"], Tensor, int]:
        numbers, pixels = [], []
        for number, record in enumerate(records, start):
            try:
                pixels.append(self.transform(record.decode()))
                numbers.append(number)
            except BrokenImage:
                pass  # counted by its absence
        stacked = torch.stack(pixels) if pixels else torch.empty(0)
        return torch.tensor(numbers, dtype=torch.int64), stacked, len(records)


def _batched(records: Iterable[Record], batch_size: int) -> Iterator[list[Record]]:
    records = iter(records)
    while batch := list(islice(records, batch_size)):
        yield batch


def _raise_first_broken(dataset: BenchmarkSet, broken: int, images: int, share: float) -> None:
    for record in dataset.records():
        try:
            record.decode()
        except BrokenImage as error:
            told = f"{broken} of {images} images cannot be decoded, and --max_broken lets {share:g} of them pass"
            raise UserError(f"{told}; the first: {error}") from error


def embed_texts(embedder: Embedder, texts: Sequence[str]) -> Float[Tensor, "m d"]:
    """L2-normalised embeddings of texts, fp32 or wider, on the CPU. Of equal texts one is embedded."""
    distinct = list(dict.fromkeys(texts))
    starts = range(0, len(distinct), embedder.batch_size)
    tokens = torch.cat([embedder.clip.tokenize(distinct[s : s + embedder.batch_size]) for s in starts])
    path = None
    if embedder.cache is not None:
        digest = hashlib.sha256(embedder.fingerprint + tokens.numpy().tobytes())
        path = embedder.cache / _file("texts", digest)
    stored = None if path is None else disk_cache.read(path)
    if path is None or not embedder.is_with_all(stored):
        stored = {"rows": _embed_tokens(embedder, tokens)}
        if path is not None and embedder.part[0] == 0:
            disk_cache.write(path, stored)
    assert stored is not None  # by is_with_all
    _require_finite(embedder.clip, stored["rows"], "text")
    number = {text: index for index, text in enumerate(distinct)}
    return stored["rows"][torch.tensor([number[text] for text in texts])]


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
            found = embedder.clip.towers.encode_text(batch.to(embedder.device))
            rows[start : start + size] = F.normalize(upcast(found), dim=-1).cpu()
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
    # A comparison with nan is false, so a broken model would score like a perfect one, or like a guess.
    if not rows.isfinite().all():
        raise UserError(f"the {tower} tower of {clip.name!r} gives embeddings that are not finite")


# ---- classes as texts --------------------------------------------------------------------------------------------


def zero_shot_classifier(
    embedder: Embedder, *, classnames: Sequence[str], templates: Templates
) -> Float[Tensor, "C d"]:
    """One unit vector per class: the normalised mean of the normalised embeddings of its prompts.

        w_c = z / |z|,  z = mean_t e(prompt_t(c)) / |e(prompt_t(c))|

    Args:
        templates: prompts with {c} for the class name, or {class name: [prompts]} (CuPL, arXiv 2209.03320).

    Source: CLIP_benchmark 1.6.2, `metrics/zeroshot_classification.py::zero_shot_classifier`; the same as
    open_clip's `build_zero_shot_classifier`, transposed.

    Raises:
        UserError: a template without {c}, a class without prompts.
    """
    prompts = [_prompts(name, templates) for name in classnames]
    text = embed_texts(embedder, [prompt for of_class in prompts for prompt in of_class])
    means = [of_class.mean(dim=0) for of_class in text.split([len(of_class) for of_class in prompts])]
    return F.normalize(torch.stack(means), dim=-1)


def _prompts(classname: str, templates: Templates) -> list[str]:
    if isinstance(templates, dict):
        if not templates.get(classname):
            raise UserError(f"the prompts have none for the class {classname!r}")
        return templates[classname]
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"the template {template!r} has no place for the class name: write {{c}}")
    return [template.replace("{c}", classname) for template in templates]


def class_weights(embedder: Embedder, dataset: BenchmarkSet) -> Float[Tensor, "C d"]:
    """`zero_shot_classifier` of a set's class names and templates.

    Raises:
        UserError: a set without class names or templates.
    """
    require_classes(dataset)
    assert dataset.classnames is not None and dataset.templates is not None  # asked above
    return zero_shot_classifier(embedder, classnames=dataset.classnames, templates=dataset.templates)


def require_classes(dataset: BenchmarkSet) -> None:
    """Raises: UserError for a set without class names or templates."""
    if dataset.kind in ("retrieval", "choice"):
        raise UserError(f"{dataset.name} is a {dataset.kind} set: it has no classes; use eval/retrieval.py")
    if not dataset.classnames:
        raise UserError(
            f"{dataset.name} has no classnames.txt: write one name a line, by label, or give --custom_classname_file"
        )
    if not dataset.templates:
        raise UserError(
            f"{dataset.name} has no {TEMPLATES_FILE}: write one prompt a line, {{c}} for the class name, or give "
            "--custom_template_file"
        )


def top_names(
    embedder: Embedder, *, images: Sequence[Image.Image], dataset: BenchmarkSet, k: int
) -> list[list[tuple[str, float]]]:
    """For each image the k most probable class names of the set: (name, softmax of scaled similarities).

    By this process alone.
    """
    clip = embedder.clip
    classifier = class_weights(replace(embedder, alone=True), dataset)
    assert dataset.classnames is not None  # asked by class_weights
    with evaluating(clip.towers), torch.inference_mode():
        pixels = torch.stack([clip.image_transform()(image) for image in images]).to(embedder.device)
        image = upcast(clip.towers.encode_image(pixels)).cpu()
        scale = clip.towers.log_scale().exp().cpu()
        best = (scale * image @ classifier.T).softmax(dim=1).topk(min(k, len(classifier)), dim=1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[(dataset.classnames[c], p) for c, p in zip(*row, strict=True)] for row in rows]


def milliseconds_per_image(*, clip: Clip, device: torch.device | str, batch_size: int = 64, repeats: int = 5) -> float:
    """Time of the image tower alone, median of `repeats` batches after one warm-up; no benchmark."""
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


# ---- classifiers -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    *, classifier: Classifier, views: Views, view: int, count: int, device: torch.device, batch_size: int = 256
) -> Float[Tensor, "n C"]:
    """Logits of a view of images 0 .. count - 1, on the CPU. The caller sets the mode of the model."""
    starts = range(0, count, batch_size)
    ids = ((view, torch.arange(start, min(start + batch_size, count))) for start in starts)
    batches = tqdm(views.batches(ids), total=len(starts), desc="classify", leave=False, disable=None)
    return torch.cat([classifier.model(classifier.prepare(images.to(device))).float().cpu() for images in batches])
