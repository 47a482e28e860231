"""Rebuilds the bundled tokenizer: CLIP's byte-pair encoding with its most frequent merges only, 4,096 tokens.

    python -m gkl_vl.assets.build_tokenizer --out gkl_vl/assets/tokenizer

The small bundled models use it because CLIP's 49,408 token embeddings would have twenty times the parameters of their
towers. It is an ordinary `CLIPTokenizer` folder; the end-of-text token has the highest id, as CLIP's `argmax` pooling
needs, and 0 is padding, as in CLIP.
Source of the merges: openai/CLIP, `clip/bpe_simple_vocab_16e6.txt.gz` (MIT), as installed with open_clip_torch.
"""

import argparse
import gzip
from pathlib import Path

from open_clip.tokenizer import bytes_to_unicode, default_bpe
from transformers import CLIPTokenizer

VOCAB_SIZE = 4096
CONTEXT_LENGTH = 24


def build() -> CLIPTokenizer:
    """Builds the tokenizer from the merges in open_clip_torch."""
    merges = gzip.open(default_bpe()).read().decode("utf-8").split("\n")[1:]
    characters = list(bytes_to_unicode().values())
    special = ["<|startoftext|>", "<|endoftext|>"]
    kept = merges[: VOCAB_SIZE - 2 * len(characters) - len(special)]
    tokens = characters + [c + "</w>" for c in characters] + ["".join(m.split()) for m in kept] + special
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[tuple(merge.split()) for merge in kept],  # pyright: ignore[reportArgumentType]: the hint is too narrow
        pad_token="!",
        model_max_length=CONTEXT_LENGTH,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tokenizer")
    build().save_pretrained(parser.parse_args().out)
