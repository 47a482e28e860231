"""A CLIP of a few thousand random weights, in open_clip's architecture."""

import json
from pathlib import Path

import torch

from gkl_vl.towers import Clip, load_clip

CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def tiny_clip(folder: Path) -> Clip:
    """With CLIP's own tokenizer; its configuration is left in `folder`."""
    path = folder / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    return load_clip(str(path))
