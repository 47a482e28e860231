"""The study of docs/teachers.md: students of an online teacher, and of its stored embeddings in float16 and int8.

    python benchmarks/studies/stored_teacher.py

The bundled drawings as a user's own shards: `recipes/clip_kd.py --train-data`, whose online teacher embeds a new view
of each image in every epoch, against stores of six views by `recipes/store_teacher.py`, on equal seeds. Runs that are
done already are not run again.
"""

import subprocess
import sys
from pathlib import Path

from study import RECIPES, Arm, Arms, make_clip_parser, make_clip_study

from gkl_vl.data.pairs import BUNDLED

DATA = ["--train-data", f"{BUNDLED}/train/{{0..3}}.tar", "--caption-lines"]
CROSS_GKL = ["--cross-soft-ce-weight", "2", "--cross-wmse-weight", "6", "--mimicry-weight", "0"]
SETTINGS = ["--captions-per-image", "2", "--lr", "1.4e-2", "--text-lr", "3e-3"]
EVALUATION = ["--eval-data", "emoji", "emoji_unseen"]
COLUMNS: dict[str, tuple[str | None, str]] = {
    "emoji acc1": ("emoji", "acc1"),
    "emoji acc5": ("emoji", "acc5"),
    "emoji_unseen acc1": ("emoji_unseen", "acc1"),
}


def build(folder: Path, dtype: str) -> Path:
    """A store of the bundled teacher; one that is complete stays as it is."""
    path = folder / f"store_{dtype}"
    command = [sys.executable, RECIPES / "store_teacher.py", *DATA, "--dtype", dtype, "--out", path, "--workers", "1"]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, file=sys.stderr)
    return path


def main() -> None:
    parser = make_clip_parser(__doc__, seeds=[0, 1, 2], folder="runs/study_stored_teacher")
    options = parser.parse_args()
    online = "online"
    arms: Arms = {online: Arm([], None)}
    for dtype in ("float16", "int8"):
        arms[f"stored, {dtype}"] = Arm(["--teacher-store", str(build(options.output_dir, dtype))], online)
    flags = [*DATA, *CROSS_GKL, *SETTINGS, *EVALUATION]
    study = make_clip_study(options, recipe="clip_kd", arms=arms, columns=COLUMNS, flags=flags)
    print(study.table(study.run()))


if __name__ == "__main__":
    main()
