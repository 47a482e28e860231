"""Writes further formats of an exported CLIP into its folder: ONNX, int8, transformers.

    python -m gkl_vl.export runs/NAME                               # onnx/image.onnx and onnx/text.onnx
    python -m gkl_vl.export runs/NAME --formats onnx int8
    python -m gkl_vl.export runs/NAME --formats int8 --images photos --eval-set wds/cifar10
    python eval/zero_shot.py --model onnx-int8:runs/NAME

Which student has which format, and how the files are used without this package: docs/formats.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gkl_vl import cli
from gkl_vl.data.pairs import open_images
from gkl_vl.evaluation.sets import load_benchmark_sets
from gkl_vl.export.formats import MAX_DROP, Format, model_folder, summary, write_formats


@dataclass(frozen=True, kw_only=True)
class Config:
    """Writes further formats of an exported CLIP into its folder, each checked before it is kept."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run folder, or its model/."""
    formats: tuple[Format, ...] = ("onnx",)
    """onnx; int8, of ONNX; transformers, for students that have a form there."""
    images: str | None = None
    """Images for the comparison and for int8's calibration, as --train-data names them. None = bundled emoji."""
    eval_set: tuple[str, ...] = ("emoji",)
    """Sets on which int8 is compared with the model, as eval/zero_shot.py names them."""
    dataset_root: str | None = None
    """Folder of these sets, or its URL on the Hub; {dataset} and {dataset_cleaned} are filled in."""
    max_drop: float = MAX_DROP
    """Points of top-1 and recall@1 that int8 may lose."""
    debug: bool = False
    """Print the traceback of an error."""


def main(config: Config) -> None:
    """Writes the formats and prints what the folder holds then."""
    if "int8" not in config.formats:
        given = {
            name: None if value == vars(Config)[name] else value
            for name, value in vars(config).items()
            if name != "folder"
        }
        cli.refuse_unused(given, ["eval_set", "dataset_root", "max_drop"], "has no effect without int8 in --formats")
    folder = model_folder(config.folder)
    sets = (
        load_benchmark_sets(config.eval_set, root=config.dataset_root, split="test") if "int8" in config.formats else []
    )
    write_formats(
        folder,
        config.formats,
        images=None if config.images is None else open_images(config.images),
        sets=sets,
        max_drop=config.max_drop,
    )
    print(summary(folder))


if __name__ == "__main__":
    cli.run(main, Config)
