"""Exports the student of a finished run as the bundled teacher: fp16 safetensors, model card and results.jsonl.

    accelerate launch recipes/clip_kd.py --teacher none --student emoji-teacher --steps 2500 --warmup 150 \
        --precision bf16 --ema-decay 0.998 --eval-every-steps 400 --checkpoint-every-steps 400 --output-dir runs/teacher
    python -m gkl_vl.assets.build_teacher runs/teacher
"""

import argparse
import shutil
from pathlib import Path

import torch

from gkl_vl.export.cards import ClipCard, RunFacts
from gkl_vl.export.hub import export_clip
from gkl_vl.models.clip import BUNDLED_TEACHER, load_clip
from gkl_vl.training.checkpoint import RunFolder


def ship(run: RunFolder, folder: Path) -> None:
    """Writes `folder` from the run's model/, config.json and results.jsonl."""
    config, records = run.config(), run.records()
    last = max(record["step"] for record in records)
    card = ClipCard(
        student=config["student"],
        teachers=(),
        license="mit",
        datasets=["bundled emoji (Noto, Twemoji)"],
        run=RunFacts(
            command=config["command"],
            commit=config["commit"],
            steps=last,
            seed=config["seed"],
            metrics=[record for record in records if "model" in record and record["step"] == last],
        ),
    )
    clip = load_clip(f"local-dir:{run.path / 'model'}")
    export_clip(clip=clip, folder=folder, card=card, dtype=torch.float16, transformers=False)
    shutil.copy(run.results, folder / "results.jsonl")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder")
    ship(RunFolder(parser.parse_args().run, is_main=False), Path(BUNDLED_TEACHER.removeprefix("local-dir:")))
