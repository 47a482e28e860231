"""Two small CLIPs for tests: open_clip's architecture with random weights, and one that distinguishes two colours."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from small_sets import COLOURS
from torch import nn

from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.towers import OpenClipTowers

CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def tiny_clip(folder: Path) -> Clip:
    """open_clip's architecture with CLIP's tokenizer. Writes its configuration to `folder`."""
    path = folder / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    return load_clip(str(path))


class ColourBlind(nn.Module):
    """Embeds an image by the mean of its channels, with blue added to green, and a text by the colour that it names."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(3)

    def encode_image(self, pixels, normalize):
        red, green, blue = pixels.mean(dim=(2, 3)).clamp(min=0.01).unbind(dim=1)
        channels = self.norm(self.dropout(torch.stack([red, green + blue, 0 * blue], dim=1)))
        return F.normalize(self.gain * channels, dim=-1)

    def encode_text(self, tokens, normalize):
        return F.normalize(F.one_hot(tokens[:, 0], 4)[:, :3].float() + 0.1, dim=-1)


def name_colours(texts: list[str]) -> torch.Tensor:
    """Tokens of the texts: the index of the first colour that a text names, or 3."""
    rows = [next((i for i, colour in enumerate(COLOURS) if colour in text), 3) for text in texts]
    return torch.tensor(rows)[:, None]


def colour_blind_clip() -> Clip:
    """Untrained: its batch norm is the identity in evaluation mode."""
    return Clip(
        name="colour-blind",
        towers=OpenClipTowers(ColourBlind()),
        preprocess=PreprocessCfg(size=8, mean=(0, 0, 0), std=(1, 1, 1)),
        tokenize=name_colours,
        hf_tokenizer=None,
        model_cfg={"embed_dim": 3},
    )
