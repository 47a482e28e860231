"""Checks for masked gradients."""

from pathlib import Path

import torch

from gkl_vl.errors import UserError
from gkl_vl.report.tables import percent
from gkl_vl.robustness.autoattack import Attack, AttackName
from gkl_vl.robustness.measure import measure
from gkl_vl.robustness.pgd import Norm
from gkl_vl.robustness.results import format_epsilon
from gkl_vl.robustness.targets import Examples, Target

MIN_GAP = 0.02
"""Smallest difference of accuracies that counts, as a share of the images; smaller ones can be chance."""


def check_masking(
    *,
    attack: Attack,
    target: Target,
    examples: Examples,
    images: int = 200,
    batch_size: int = 250,
    state_dir: Path | None = None,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, float], list[str]]:
    """Measures the accuracies that `masking_warnings` compares, on evenly spaced images.

    `attack` gives norm, epsilon and seed. Resumes as `measure` does, from folders below `STATE_DIR-masking`.

    Returns: accuracies by name of the attack, and the warnings.
    """
    if images < 1:
        raise UserError(f"--masking-images {images} must be at least 1")
    count = min(images, len(examples.labels))
    chosen = torch.arange(count) * len(examples.labels) // count
    part = Examples(
        name=examples.name,
        images=examples.images[chosen],
        labels=examples.labels[chosen],
        num_classes=examples.num_classes,
        draw=f"{count} evenly spaced of {examples.draw}",
    )

    def accuracy_under(name: AttackName, epsilon: float) -> tuple[float, list[str]]:
        part_attack = Attack(name=name, norm=attack.norm, epsilon=epsilon, seed=attack.seed)
        folder = None if state_dir is None else Path(f"{state_dir}-masking") / f"{name}-{epsilon:.6g}"
        outcome = measure(
            attack=part_attack, target=target, examples=part, batch_size=batch_size, state_dir=folder, device=device
        )
        return outcome.accuracies()[name], outcome.warnings

    apgd, apgd_warnings = accuracy_under("apgd-ce", attack.epsilon)
    square, square_warnings = accuracy_under("square", attack.epsilon)
    epsilons = growing_epsilons(attack.epsilon, norm=attack.norm, numbers=part.images[0].numel())
    growing: dict[float, float] = {epsilon: accuracy_under("pgd100", epsilon)[0] for epsilon in epsilons}
    warnings = masking_warnings(pgd=growing[epsilons[0]], apgd=apgd, square=square, growing=growing)
    accuracies = {"apgd-ce": apgd, "square": square} | {
        f"pgd100 at {format_epsilon(epsilon)}": float(accuracy) for epsilon, accuracy in growing.items()
    }
    return accuracies, list(dict.fromkeys(apgd_warnings + square_warnings)) + warnings


def growing_epsilons(epsilon: float, *, norm: Norm, numbers: int) -> tuple[float, ...]:
    """epsilon, 2 epsilon, 4 epsilon, ... up to the radius within which every image can be made plain grey.

    That is 0.5 for linf and 0.5 sqrt(numbers) for l2, `numbers` = values of an image (3 h w).
    """
    grey = 0.5 if norm == "linf" else 0.5 * numbers**0.5
    epsilons = []
    while epsilon < grey:
        epsilons.append(epsilon)
        epsilon = 2 * epsilon
    return (*epsilons, grey if epsilons else epsilon)


def masking_warnings(*, pgd: float, apgd: float, square: float, growing: dict[float, float]) -> list[str]:
    """Signs of masked gradients in these accuracies, one line each. An empty list does not prove that there are none.

    Args:
        pgd, apgd, square: accuracy in [0, 1] under PGD-100, APGD (cross entropy) and Square at the same epsilon.
        growing: epsilon -> accuracy under PGD-100; at the last epsilon every image can be made plain grey.

    Source: Carlini et al., 2019, "On Evaluating Adversarial Robustness", arXiv 1902.06705, section 5; Athalye et al.,
    ICML 2018, arXiv 1802.00420, section 3.1.
    """
    lines = []
    if pgd < apgd - MIN_GAP:
        lines.append(f"accuracy {percent(pgd)} under plain PGD, below {percent(apgd)} under APGD: APGD is stuck")
    if square < apgd - MIN_GAP:
        lines.append(
            f"accuracy {percent(square)} under Square, which uses no gradients, below {percent(apgd)} under APGD: "
            "gradients of the cross entropy are masked"
        )
    steps = list(growing.items())
    for (small, few), (large, many) in zip(steps, steps[1:], strict=False):
        if many > few + MIN_GAP:
            lines.append(
                f"accuracy {percent(many)} under PGD at epsilon {format_epsilon(large)}, above {percent(few)} at "
                f"{format_epsilon(small)}: it must not rise with epsilon"
            )
    epsilon, accuracy = steps[-1]
    if accuracy > MIN_GAP:
        lines.append(
            f"accuracy {percent(accuracy)} under PGD at epsilon {format_epsilon(epsilon)}, where every image can be "
            "made plain grey: it must be 0"
        )
    return [f"masked gradients? {line}; the robust accuracy may be far too high" for line in lines]
