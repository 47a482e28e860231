"""Zero-shot accuracy of a CLIP under attack.

Axis letters: n = images of a batch, C = classes, d = embedding, h w = pixels.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from gkl_vl.distributed import gather_objects
from gkl_vl.errors import UserError
from gkl_vl.evaluation.embed import Embedder, class_weights
from gkl_vl.evaluation.sets import BenchmarkSet
from gkl_vl.models.clip import Clip, ImageTower
from gkl_vl.robustness.autoattack import Attack, deterministic_cudnn, distinct_warnings
from gkl_vl.robustness.measure import attack_batch, check_attack
from gkl_vl.robustness.pgd import Norm
from gkl_vl.robustness.results import wilson_interval
from gkl_vl.robustness.targets import Examples, Target


class ZeroShot(nn.Module):
    """Zero-shot classifier on pixels in [0, 1] at the CLIP's image size: scale * <image embedding, class weight>."""

    classifier: Tensor

    def __init__(self, clip: Clip, classifier: Float[Tensor, "C d"]):
        super().__init__()
        self.tower = ImageTower(clip)
        self.register_buffer("classifier", classifier)

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n C"]:
        scale = self.tower.towers.log_scale().exp()
        return scale * self.tower(pixels).float() @ self.classifier.T


def attack_zero_shot(
    *,
    embedder: Embedder,
    dataset: BenchmarkSet,
    norm: Norm,
    epsilon: float,
    images: int,
    seed: int = 0,
) -> tuple[dict[str, float], list[str]]:
    """Computes zero-shot accuracy before and under APGD: cross entropy, 100 steps, white box; texts are not attacked.

    Images are prepared as in `embed_images`. The perturbation is applied to the prepared image, at the model's size,
    and is at most `epsilon` in pixels of [0, 1]. The loss is the cross entropy of the softmax over scaled similarities,
    whose gradients a large scale can mask: the accuracy is an upper bound of that under stronger attacks.

    Every process calls this and returns the complete result. Batch k is attacked by process k mod world size, always
    from the same seed, so the numbers do not depend on the number of processes.

    Args:
        embedder: the model's modes and the global random state do not change; precision is fp32.
        images: largest number of images, evenly spaced in the set's order; the choice is deterministic.
        seed: seed of the random start of each batch.

    Returns: metrics with NORM in their names, and the warnings about them, one line each.

        apgd_NORM_acc1, apgd_NORM_acc1_low, apgd_NORM_acc1_high  accuracy under attack and its 95 % interval
        apgd_NORM_clean_acc1                                     accuracy on the same images before the attack
        apgd_NORM_epsilon, apgd_NORM_n                           radius, number of images

    Raises: UserError for a set without classes, without pyautoattack, for fewer than 1 image, and as `measure`.

    Source: Croce and Hein, ICML 2020, arXiv 2003.01690.
    """
    attack = Attack(name="apgd-ce", norm=norm, epsilon=epsilon, seed=seed)
    examples = _zero_shot_examples(embedder.clip, dataset, images)
    classifier = class_weights(embedder, dataset)  # all ranks
    model = ZeroShot(embedder.clip, classifier.to(embedder.device))
    target = Target(architecture=embedder.clip.name, model=model)
    check_attack(attack, target, examples, embedder.batch_size, embedder.device)
    results = _attack_batches(embedder, attack, target, examples)  # all ranks
    n = len(examples.labels)
    clean, robust = (sum(sum(result["flags"][name]) for result in results) for name in ("clean", attack.name))
    low, high = wilson_interval(hits=robust, n=n)
    metrics = {"acc1": robust / n, "acc1_low": low, "acc1_high": high, "clean_acc1": clean / n}
    metrics |= {"epsilon": float(epsilon), "n": float(n)}
    warnings = distinct_warnings([result["warnings"] for result in results])
    return {f"apgd_{norm}_{name}": value for name, value in metrics.items()}, warnings


def _zero_shot_examples(clip: Clip, dataset: BenchmarkSet, images: int) -> Examples:
    if images < 1:
        raise UserError(f"--attack-images {images} must be at least 1")
    total = sum(1 for _ in dataset.records("cls"))
    count = min(images, total)
    chosen = {k * total // count for k in range(count)}
    transform = clip.scaled_transform()
    pixels, labels = [], []
    for number, record in enumerate(dataset.records("cls")):
        if number in chosen:
            pixels.append((transform(record.decode()) * 255).round().byte())  # exact: they are multiples of 1/255
            labels.append(record.targets["cls"])
    return Examples(
        name=dataset.name,
        images=torch.stack(pixels),
        labels=torch.tensor(labels),
        num_classes=len(dataset.classnames or ()),
        draw=f"{count} evenly spaced of {total}",
    )


def _attack_batches(embedder: Embedder, attack: Attack, target: Target, examples: Examples) -> list[dict[str, Any]]:
    """Results of `attack_batch` for all batches, in order, each computed by one process. All ranks."""
    batches = torch.arange(len(examples.labels)).split(embedder.batch_size)
    process, processes = embedder.part
    own_numbers = range(process, len(batches), processes)
    bar = tqdm(own_numbers, desc="attack", unit="batch", leave=False, disable=None if process == 0 else True)
    with bar, deterministic_cudnn():
        own = {number: attack_batch(attack, target, examples, batches[number], embedder.device) for number in bar}
    results: dict[int, dict[str, Any]] = {}
    for of_rank in [own] if embedder.alone else gather_objects(own):  # all ranks
        results |= of_rank
    return [results[number] for number in range(len(batches))]
