"""Zero-shot accuracy of a CLIP under attack.

Axis letters: n = images of a batch, C = classes, d = embedding, h w = pixels.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

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
    """A CLIP as a classifier of pixels in [0, 1] at its size: scale * <image embedding, class weight>."""

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
    """Zero-shot accuracy before and under APGD on the cross entropy, 100 steps, white box, text left alone.

    The images are prepared as for `embed_images`, and the attack moves them as the model sees them, at its size, by at
    most `epsilon` in pixels of [0, 1]. It raises the cross entropy of the softmax over scaled similarities, whose
    gradients a large scale can mask: the number is an upper bound of what stronger attacks leave.

    Args:
        embedder: the model's modes and the global random state are left alone; precision is fp32.
        images: so many at most, evenly spaced in the set's order, always the same ones.
        seed: of each batch's random start.

    Returns: metrics with NORM in their names, and what makes them doubtful, a line each.

        apgd_NORM_acc1, apgd_NORM_acc1_low, apgd_NORM_acc1_high  share still classified right and its 95 % interval
        apgd_NORM_clean_acc1                                     of the same images, before the attack
        apgd_NORM_epsilon, apgd_NORM_n                           radius, number of images

    Raises: UserError for a set without classes, pyautoattack missing, fewer than 1 image, and as `measure`.

    Source: Croce and Hein, ICML 2020, arXiv 2003.01690.
    """
    clip, batch_size, device = embedder.clip, embedder.batch_size, embedder.device
    attack = Attack(name="apgd-ce", norm=norm, epsilon=epsilon, seed=seed)
    examples = _zero_shot_examples(clip, dataset, images)
    classifier = class_weights(embedder, dataset)
    target = Target(architecture=clip.name, model=ZeroShot(clip, classifier.to(device)))
    check_attack(attack, target, examples, batch_size, device)
    parts, heard = [], []
    bar = tqdm(
        torch.arange(len(examples.labels)).split(batch_size), desc="attack", unit="batch", leave=False, disable=None
    )
    with bar, deterministic_cudnn():
        for index in bar:
            part = attack_batch(attack, target, examples, index, device)
            parts.append(part["flags"])
            heard.append(part["warnings"])
    n = len(examples.labels)
    clean, hits = (sum(sum(flags[name]) for flags in parts) for name in ("clean", "apgd-ce"))
    low, high = wilson_interval(hits=hits, n=n)
    found = {"acc1": hits / n, "acc1_low": low, "acc1_high": high, "clean_acc1": clean / n}
    found |= {"epsilon": float(epsilon), "n": float(n)}
    return {f"apgd_{norm}_{name}": value for name, value in found.items()}, distinct_warnings(heard)


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
