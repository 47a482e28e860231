"""Result records and tables of attacks, and the interval of an accuracy."""

import math
from typing import Any

import torch

from gkl_vl.report.tables import percent
from gkl_vl.robustness.autoattack import target_classes
from gkl_vl.robustness.measure import Outcome
from gkl_vl.robustness.targets import Examples

UPPER_BOUND = "not AutoAttack: an upper bound"


def wilson_interval(*, hits: int, n: int) -> tuple[float, float]:
    """Computes the 95 % score interval of a share, given `hits` among `n` independent images.

        (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),   p = hits/n,  z = 1.96

    Both ends are in [0, 1], and unlike p -+ z sqrt(p (1 - p)/n) it does not shrink to a point at 0 or n hits. It covers
    the choice of images, not of the attack: accuracy under a stronger attack can be below its lower end.

    Source: Wilson, JASA 22 (1927) 209-212.

    Raises: ValueError unless 0 <= hits <= n and n >= 1.
    """
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"{hits} hits of {n}: hits must be between 0 and n, and n at least 1")
    z = 1.959963984540054
    p = hits / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (end / (1 + z * z / n) for end in (middle - half, middle + half))
    return (0.0 if hits == 0 else low, 1.0 if hits == n else high)  # exact, in spite of rounding


def result_record(
    outcome: Outcome, *, model: str, pretrained: str, examples: Examples, masking: dict[str, float], warnings: list[str]
) -> dict[str, Any]:
    """Returns the record for the results file: shares in [0, 1], epsilon in pixel values of [0, 1].

    `after` = accuracy after each part of the attack; `note` marks all attacks but AutoAttack as upper bounds; intervals
    by `wilson_interval`; `masking` and `warnings` = results of `check_masking`.
    """
    attack, (clean, *_, robust) = outcome.attack, outcome.flags.values()
    is_autoattack = attack.name == "autoattack"
    shares = outcome.accuracies()
    return {
        "model": model,
        "pretrained": pretrained,
        "dataset": examples.name,
        "task": "adversarial_robustness",
        "attack": attack.name,
        "version": attack.version if is_autoattack else None,
        "note": None if is_autoattack else UPPER_BOUND,
        "settings": attack.described(),
        "norm": attack.norm,
        "epsilon": attack.epsilon,
        "n": len(clean),
        "draw": examples.draw,
        "seed": attack.seed,
        "clean_acc1": shares["clean"],
        "clean_acc1_interval": wilson_interval(hits=int(clean.sum()), n=len(clean)),
        "robust_acc1": list(shares.values())[-1],
        "robust_acc1_interval": wilson_interval(hits=int(robust.sum()), n=len(robust)),
        "after": {name: share for name, share in shares.items() if name != "clean"},
        "target_classes": target_classes(examples.num_classes) if is_autoattack else None,
        "masking": masking,
        "warnings": outcome.warnings + warnings,
        "batch_size": outcome.settings["batch_size"],
        "architecture": outcome.settings["architecture"],
        "model_sha256": outcome.settings["model_sha256"],
        "pyautoattack": outcome.settings["pyautoattack"],
        "torch": torch.__version__,
        "seconds": round(outcome.seconds, 1),
    }


def results_table(record: dict[str, Any]) -> str:
    """Formats a record as text: model, data and settings, a line for each accuracy, then notes and warnings."""
    last = list(record["after"])[-1]
    rows = {"clean": (record["clean_acc1"], record["clean_acc1_interval"])}
    rows |= {f"after {name}": (share, None) for name, share in record["after"].items() if name != last}
    rows[f"robust, after {last}"] = (record["robust_acc1"], record["robust_acc1_interval"])
    lines = [
        f"{record['model']} on {record['dataset']} · {record['draw']} · {record['norm']} "
        f"{format_epsilon(record['epsilon'])} · seed {record['seed']}",
        record["settings"] + (f" · {record['note']}" if record["note"] else ""),
    ]
    for name, (share, interval) in rows.items():
        suffix = "" if interval is None else f"   95 %: {percent(interval[0])} to {percent(interval[1])}"
        lines.append(f"{name:24}{percent(share):>10}{suffix}")
    if record["target_classes"] not in (None, 9):
        lines.append(f"targeted parts aim at {record['target_classes']} classes, all but the true one, not at 9")
    lines += [f"masking, {name:<15}{percent(share):>10}" for name, share in record["masking"].items()]
    return "\n".join([*lines, *(f"warning: {line}" for line in record["warnings"])])


def format_epsilon(epsilon: float) -> str:
    """As k/255 where k is an integer, else with 4 digits."""
    levels = 255 * epsilon
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 else f"{epsilon:.4g}"
