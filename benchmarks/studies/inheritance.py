"""The study of docs/students.md: a student that starts from its teacher's layers, heads and neurons, or at random.

    python benchmarks/studies/inheritance.py

Both models are ViTs: the teacher (`vit_teacher.json`) is distilled from the bundled one first, 300 steps on seed 20,
and the student (`vit_half.json`) has half of its width, heads, neurons and layers. Runs that are done already are not
run again.
"""

import os
import subprocess
import sys
from pathlib import Path

from study import ENVIRONMENT, ONLY_AT_THE_END, RECIPES, Arm, Arms, make_clip_parser, make_clip_study

HERE = Path(__file__).parent
RANDOM = "random weights"
START = ["--steps", "1", "--warmup", "0", "--lr", "0", "--wd", "0"]
ARMS: Arms = {
    "random weights, start": Arm(START, None),
    "inherited, start": Arm([*START, "--init-from-teacher"], "random weights, start"),
    RANDOM: Arm([], None),
    "inherited": Arm(["--init-from-teacher"], RANDOM),
    "inherited, first layers": Arm(["--init-from-teacher", "--inherit-layers", "0", "1"], "inherited"),
}


def train_teacher(folder: Path) -> Path:
    """The run of the ViT teacher."""
    run = folder / "teacher"
    if not (run / "model").is_dir():
        flags = ["--student", HERE / "vit_teacher.json", "--lr", "1e-3", "--seed", "20", "--output-dir", run]
        command = [sys.executable, RECIPES / "clip_kd.py", *flags, *ONLY_AT_THE_END, "--workers", "0"]
        subprocess.run(command, check=True, env=os.environ | ENVIRONMENT)
    return run


def main() -> None:
    parser = make_clip_parser(__doc__, seeds=[0, 1, 2], folder="runs/study_inheritance", steps=100)
    options = parser.parse_args()
    teacher = train_teacher(options.output_dir)
    flags = ["--teacher", str(teacher), "--student", str(HERE / "vit_half.json"), "--lr", "1e-3"]
    study = make_clip_study(options, recipe="clip_kd", arms=ARMS, flags=flags)
    print(study.table(study.run()))


if __name__ == "__main__":
    main()
