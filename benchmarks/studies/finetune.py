"""The study of docs/students.md: a fine-tuned CLIP, and its average with its start, on new and old drawings.

    python benchmarks/studies/finetune.py

`recipes/clip_finetune.py` without flags, on equal seeds: with the start as teacher, without a teacher, with a locked
text tower, with adapters alone. The start is the same on all seeds. Runs that are done already are not run again.
"""

from dataclasses import replace

from study import Arm, Arms, make_clip_parser, make_clip_study

HELD = "start as teacher"
ARMS: Arms = {
    HELD: Arm([], None),
    "no teacher": Arm(["--teacher", "none"], HELD),
    "locked text tower": Arm(["--lock-text"], HELD),
    "adapters": Arm(["--lora-rank", "8", "--lora-targets", "conv", "attn", "c_fc", "c_proj", "--lr", "1e-3"], HELD),
}
COLUMNS: dict[str, tuple[str | None, str]] = {
    "new acc1": ("emoji, odd", "acc1"),
    "new acc5": ("emoji, odd", "acc5"),
    "old acc1": ("emoji_unseen", "acc1"),
    "old acc5": ("emoji_unseen", "acc5"),
}


def main() -> None:
    parser = make_clip_parser(__doc__, seeds=[0, 1, 2], folder="runs/study_finetune", steps=40)
    options = parser.parse_args()
    flags = ["--warmup", "10"]
    study = make_clip_study(options, recipe="clip_finetune", arms=ARMS, columns=COLUMNS, flags=flags)
    for model in ("mixed 0", "mixed 0.5", "student"):
        of_model = replace(study, model=model)
        print(f"{model}:\n{of_model.table(of_model.run())}\n")


if __name__ == "__main__":
    main()
