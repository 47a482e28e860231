"""Checks for masked gradients."""

from pathlib import Path

import torch

from gkl_vl.errors import UserError
from gkl_vl.report import percent
from gkl_vl.robustness.autoattack import Attack, AttackName
from gkl_vl.robustness.measure import measure
from gkl_vl.robustness.pgd import Norm
from gkl_vl.robustness.results import format_epsilon
from gkl_vl.robustness.targets import Examples, Target

CLEARLY = 0.02
"""Share of the images from which on a weaker attack's lead over a stronger one is no accident."""


def growing_epsilons(epsilon: float, *, norm: Norm, numbers: int) -> tuple[float, ...]:
    """epsilon, 2 epsilon, 4 epsilon, ... up to the radius within which every image can be made plain grey.

    That is 0.5 for linf and 0.5 sqrt(numbers) for l2, `numbers` = values of an image (3 h w).
    """
    grey = 0.5 if norm == "linf" else 0.5 * numbers**0.5
    ladder = []
    while epsilon < grey:
        ladder.append(epsilon)
        epsilon = 2 * epsilon
    return (*ladder, grey if ladder else epsilon)


def masking_warnings(*, pgd: float, apgd: float, square: float, growing: dict[float, float]) -> list[str]:
    """What in these accuracies hints at masked gradients, a line each; none is no proof that they are not.

    Args:
        pgd, apgd, square: accuracy in [0, 1] under PGD-100, APGD (cross entropy) and Square at the same epsilon.
        growing: epsilon -> accuracy under PGD-100, the last one where every image can be made plain grey.

    Source: Carlini et al., 2019, "On Evaluating Adversarial Robustness", arXiv 1902.06705, section 5; Athalye et al.,
    ICML 2018, arXiv 1802.00420, section 3.1.
    """
    lines = []
    if pgd < apgd - CLEARLY:
        lines.append(f"plain PGD leaves {percent(pgd)}, less than APGD's {percent(apgd)}: APGD is stuck")
    if square < apgd - CLEARLY:
        lines.append(
            f"Square, which sees no gradients, leaves {percent(square)}, less than APGD's {percent(apgd)}: gradients "
            "of the cross entropy are masked"
        )
    steps = list(growing.items())
    for (small, few), (large, many) in zip(steps, steps[1:], strict=False):
        if many > few + CLEARLY:
            lines.append(
                f"PGD leaves {percent(many)} at epsilon {format_epsilon(large)}, more than {percent(few)} at "
                f"{format_epsilon(small)}: more room must not help the model"
            )
    epsilon, left = steps[-1]
    if left > CLEARLY:
        lines.append(
            f"PGD leaves {percent(left)} at epsilon {format_epsilon(epsilon)}, where every image can be made plain "
            "grey: it must come to 0"
        )
    return [f"masked gradients? {line}; the robust accuracy may be far too high" for line in lines]


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
    """Measure what `masking_warnings` asks for on evenly spaced images; the accuracies by name, and its lines.

    `attack` gives norm, epsilon and seed. Resumes as `measure` does, in folders below `STATE_DIR-masking`.
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

    def left(name: AttackName, epsilon: float) -> tuple[float, list[str]]:
        weaker = Attack(name=name, norm=attack.norm, epsilon=epsilon, seed=attack.seed)
        folder = None if state_dir is None else Path(f"{state_dir}-masking") / f"{name}-{epsilon:.6g}"
        outcome = measure(
            attack=weaker, target=target, examples=part, batch_size=batch_size, state_dir=folder, device=device
        )
        return outcome.accuracies()[name], outcome.warnings

    apgd, heard = left("apgd-ce", attack.epsilon)
    square, heard_too = left("square", attack.epsilon)
    ladder = growing_epsilons(attack.epsilon, norm=attack.norm, numbers=part.images[0].numel())
    growing: dict[float, float] = {epsilon: left("pgd100", epsilon)[0] for epsilon in ladder}
    lines = masking_warnings(pgd=growing[ladder[0]], apgd=apgd, square=square, growing=growing)
    found = {"apgd-ce": apgd, "square": square} | {
        f"pgd100 at {format_epsilon(e)}": float(a) for e, a in growing.items()
    }
    return found, list(dict.fromkeys(heard + heard_too)) + lines
