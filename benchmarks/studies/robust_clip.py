"""The study of robust CLIP students in recipes/README.md: clean accuracy, and what APGD leaves of it, on equal seeds.

    python benchmarks/studies/robust_clip.py

Arms on the bundled data: `recipes/clip_kd.py`, and `recipes/clip_robust.py` at each --train-epsilon, as it is and with
the terms of the batch and mimicry in place of cross logits. Each student is then attacked by `eval/zero_shot.py`'s APGD
on the same images of `emoji`. Runs and attacks that are done are not done again. Prints a Markdown table: mean and
standard deviation over seeds, paired differences of the clean accuracy with standard error.
"""

import json
import sys
from pathlib import Path

import torch
from study import IN_BATCH, Arm, Arms, make_clip_parser, make_clip_study

from gkl_vl.atomic import write_json
from gkl_vl.evaluation.embed import Embedder
from gkl_vl.evaluation.sets import load_benchmark_set
from gkl_vl.models.clip import load_clip
from gkl_vl.robustness.pgd import radius
from gkl_vl.robustness.zero_shot import attack_zero_shot

PLAIN = "plain"


def main() -> None:
    parser = make_clip_parser(__doc__, seeds=[0, 1], folder="runs/study_robust_clip")
    parser.add_argument("--train-epsilon", nargs="+", default=["4/255"], help="of the robust arms' attacks")
    parser.add_argument("--epsilon", nargs="+", default=["2/255", "4/255", "8/255"], help="of the attacks in the table")
    parser.add_argument("--images", type=int, default=500, help="of `emoji`, evenly spaced, that are attacked")
    options = parser.parse_args()
    arms: Arms = {PLAIN: Arm([], None)}
    for epsilon in options.train_epsilon:
        attack = ["--norm", "linf", "--epsilon", epsilon]
        arms[f"linf {epsilon}"] = Arm(attack, PLAIN, recipe="clip_robust")
        arms[f"linf {epsilon}, mimicry"] = Arm([*IN_BATCH, *attack], f"linf {epsilon}", recipe="clip_robust")
    study = make_clip_study(
        options,
        recipe="clip_kd",
        arms=arms,
        columns={"emoji acc1": ("emoji", "acc1"), "emoji_unseen acc1": ("emoji_unseen", "acc1")},
    )
    results = study.run()
    torch.set_num_threads(1)
    for (arm, seed), row in results.items():
        folder = study.folder_of(arm, seed)
        attacked = [under_attack(folder, epsilon, options.images) for epsilon in options.epsilon]
        row[f"{options.images} images"] = 100 * attacked[0]["apgd_linf_clean_acc1"]
        for epsilon, metrics in zip(options.epsilon, attacked, strict=True):
            row[f"APGD {epsilon}"] = 100 * metrics["apgd_linf_acc1"]
        print(f"{arm}, seed {seed}: attacked", file=sys.stderr)
    print(study.table(results))


def under_attack(folder: Path, epsilon: str, images: int) -> dict[str, float]:
    """`attack_zero_shot` of a run's student; the result is kept in a file."""
    file = folder / f"apgd_{epsilon.replace('/', '_')}_{images}.json"
    if not file.is_file():
        metrics, warnings = attack_zero_shot(
            embedder=Embedder(clip=load_clip(f"local-dir:{folder / 'model'}"), batch_size=250),
            dataset=load_benchmark_set("emoji"),
            norm="linf",
            epsilon=radius(epsilon, "linf"),
            images=images,
        )
        write_json(file, metrics | {"warnings": warnings})
    return json.loads(file.read_text())


if __name__ == "__main__":
    main()
