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


def train(run: Path, *flags: str | Path) -> Path:
    """The folder of a run of clip_kd.py; one that is complete is not repeated."""
    if not (run / "model").is_dir():
        command = [
            sys.executable,
            RECIPES / "clip_kd.py",
            *flags,
            "--output-dir",
            run,
            *ONLY_AT_THE_END,
            "--workers",
            "0",
        ]
        subprocess.run(command, check=True, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL)
    return run


def main() -> None:
    parser = make_clip_parser(__doc__, seeds=[0, 1, 2], folder="runs/study_inheritance", steps=100)
    options = parser.parse_args()
    teacher = train(
        options.output_dir / "teacher", "--student", HERE / "vit_teacher.json", "--lr", "1e-3", "--seed", "20"
    )
    exported = train(options.output_dir / "exported", "--student", HERE / "vit_half.json", *START)
    flags = ["--teacher", str(teacher), "--lr", "1e-3", "--student", str(HERE / "vit_half.json")]
    own = ["--student", f"transformers:{exported}/model", "--student-init", "random"]
    arms = ARMS | {"random weights, transformers' CLIPModel": Arm(own, RANDOM)}
    study = make_clip_study(options, recipe="clip_kd", arms=arms, flags=flags)
    print(study.table(study.run()))


if __name__ == "__main__":
    main()
