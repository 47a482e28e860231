"""Exported CLIPs: open_clip and transformers load them without this package and compute the same embeddings; a failed
export never replaces an earlier one. Their cards: test_cards.py; the Hub: test_hub_client.py."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gkl_vl.errors import UserError
from gkl_vl.export import hub
from gkl_vl.export.cards import ClipCard, RunFacts
from gkl_vl.export.hub import export_clip
from gkl_vl.export.transformers_format import fits_transformers, rename_tensors
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.pretrained import BUNDLED_TOKENIZER_NAME

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "mlp_ratio": 2.0}
SMALL_BPE = {"context_length": 24, "vocab_size": 4096, "hf_tokenizer_name": BUNDLED_TOKENIZER_NAME}
TEXT = {"width": 32, "heads": 2, "layers": 2}
OPENAI_BPE = {"context_length": 20, "vocab_size": 49408}
PLAIN = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": SMALL_BPE | TEXT}

CONFIGS = {
    "small_bpe": PLAIN,
    "openai_quickgelu": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": VISION,
        "text_cfg": OPENAI_BPE | TEXT,
    },
    "custom_text_eos": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": SMALL_BPE | TEXT | {"pool_type": "eos", "eos_id": 4095},
    },
    "convolutional": {
        "embed_dim": 24,
        "vision_cfg": {"timm_model_name": "test_efficientnet", "timm_pool": "", "image_size": 32},
        "text_cfg": SMALL_BPE | TEXT,
    },
    "average_pool": PLAIN | {"vision_cfg": VISION | {"pool_type": "avg"}},
    "logit_bias": PLAIN | {"init_logit_bias": -10.0},
    "last_token": PLAIN | {"text_cfg": SMALL_BPE | TEXT | {"pool_type": "last"}},
}
FITS = ["small_bpe", "openai_quickgelu", "custom_text_eos"]
TEXTS = ["a photo of a grinning face", "Flag: São Tomé & Príncipe!", "it's 1234 cats, " * 9, ""]

CARD = ClipCard(
    student="tiny",
    teachers=("hf-hub:org/big",),
    license="mit",
    datasets=["org/pairs", "emoji of two styles"],
    run=RunFacts(
        command="accelerate launch recipes/clip_kd.py --steps 7",
        commit="0123abc",
        steps=7,
        seed=3,
        metrics=[
            {"step": 0, "model": "teacher", "dataset": "emoji", "acc1": 0.5, "acc5": float("nan")},
            {"step": 7, "model": "student", "dataset": "emoji", "acc1": 0.4, "acc5": float("nan")},
            {"step": 7, "model": "student", "dataset": "emoji", "image_retrieval_recall@5": 0.125},
        ],
    ),
)


def changed(**facts) -> RunFacts:
    return dataclasses.replace(CARD.run, **facts)


# Loads exported folders with open_clip and transformers, without this package. Arguments: folder of inputs, exports.
LOAD_WITHOUT_PACKAGE = """
import json, sys
import numpy as np, open_clip, torch
from PIL import Image
from pathlib import Path
from transformers import AutoImageProcessor, AutoProcessor, CLIPModel

work = Path(sys.argv[1])
texts = json.loads((work / "texts.json").read_text())
images = [Image.open(path) for path in sorted(work.glob("*.png"))]
for folder in sys.argv[2:]:
    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + folder)
    model.eval()
    pixels = torch.stack([preprocess(image) for image in images])
    with torch.no_grad():
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(open_clip.get_tokenizer("local-dir:" + folder)(texts), normalize=True)
    out = {"pixels": pixels, "image": image, "text": text, "scale": model.logit_scale.exp()}
    if (Path(folder) / "config.json").is_file():
        model, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        processor = AutoProcessor.from_pretrained(folder)
        # PIL resizes as open_clip does; the default backend rounds differently.
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        inputs = processor(text=texts, images=images, **padded)
        with torch.no_grad():
            result = model.eval()(**inputs)
        out |= {"hf_image": result.image_embeds, "hf_text": result.text_embeds}
        out |= {"hf_pixels": inputs["pixel_values"], "hf_scale": model.logit_scale.exp()}
    np.savez(Path(folder).with_suffix(".npz"), **{k: v.detach().numpy() for k, v in out.items()})
assert "gkl_vl" not in sys.modules
"""


def make_clip(folder: Path, name: str) -> Clip:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(CONFIGS[name]))
    torch.manual_seed(0)
    clip = load_clip(str(path))
    with torch.no_grad():
        for parameter in clip.towers.parameters():  # initial biases are zero, which would hide a missing one
            parameter.add_(0.05 * torch.randn_like(parameter))
    clip.towers.eval()
    if name == "openai_quickgelu":
        preprocess = dataclasses.replace(
            clip.preprocess,
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.3, 0.4),
            resize_mode="squash",
            interpolation="bilinear",
        )
        clip = dataclasses.replace(clip, preprocess=preprocess)
    return clip


@pytest.fixture(scope="module")
def loaded_elsewhere(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Clip, dict[str, np.ndarray], list]]:
    """name -> clip, arrays that a process without this package computed from its export, input images."""
    work = tmp_path_factory.mktemp("exports")
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (48, 48), (40, 72)]
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    for index, image in enumerate(images):
        image.save(work / f"{index}.png")
    (work / "texts.json").write_text(json.dumps(TEXTS))
    clips = {name: make_clip(work, name) for name in [*FITS, "convolutional"]}
    for name, clip in clips.items():
        export_clip(clip=clip, folder=work / name, card=CARD)
    command = [sys.executable, "-c", LOAD_WITHOUT_PACKAGE, str(work), *(str(work / name) for name in clips)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {name: (clip, dict(np.load(work / f"{name}.npz")), images) for name, clip in clips.items()}


@pytest.mark.parametrize("name", [*FITS, "convolutional"])
def test_open_clip_alone_computes_the_same_embeddings(loaded_elsewhere, name: str):
    clip, theirs, images = loaded_elsewhere[name]
    pixels = torch.stack([clip.image_transform()(image) for image in images])
    with torch.no_grad():
        image, text = clip.towers.encode_image(pixels), clip.towers.encode_text(clip.tokenize(TEXTS))
        scale = clip.towers.log_scale().exp()
    np.testing.assert_allclose(theirs["pixels"], pixels.numpy(), atol=1e-6)
    np.testing.assert_allclose(theirs["image"], image.numpy(), atol=1e-6)
    np.testing.assert_allclose(theirs["text"], text.numpy(), atol=1e-6)
    np.testing.assert_allclose(theirs["scale"], scale.numpy(), rtol=1e-6)
    assert np.abs(theirs["text"][0] - theirs["text"][1]).max() > 1e-3  # the embeddings differ between inputs
    assert np.abs(theirs["image"][0] - theirs["image"][1]).max() > 1e-3


@pytest.mark.parametrize("name", FITS)
def test_transformers_computes_the_same_embeddings(loaded_elsewhere, name: str):
    _, theirs, _ = loaded_elsewhere[name]
    np.testing.assert_allclose(theirs["hf_pixels"], theirs["pixels"], atol=1e-5)
    np.testing.assert_allclose(theirs["hf_image"], theirs["image"], atol=1e-5)
    np.testing.assert_allclose(theirs["hf_text"], theirs["text"], atol=1e-5)
    np.testing.assert_allclose(theirs["hf_scale"], theirs["scale"], rtol=1e-5)


@pytest.mark.parametrize("name", ["convolutional", "average_pool", "logit_bias", "last_token"])
def test_models_without_a_transformers_equivalent_are_not_written_in_its_format(tmp_path: Path, name: str):
    clip = make_clip(tmp_path, name)
    assert not fits_transformers(clip)
    export_clip(clip=clip, folder=tmp_path / "model", card=CARD)
    assert not (tmp_path / "model" / "config.json").exists()
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert "transformers" not in (tmp_path / "model" / "README.md").read_text()


def test_renaming_keeps_all_values(tmp_path: Path):
    tensors = make_clip(tmp_path, "small_bpe").towers.model.state_dict()
    renamed = rename_tensors(tensors)
    assert sum(t.numel() for t in renamed.values()) == sum(t.numel() for t in tensors.values())
    total, again = (sum(float(t.double().sum()) for t in side.values()) for side in (tensors, renamed))
    assert again == pytest.approx(total)


def test_card_and_weights_have_the_same_permissions(tmp_path: Path):
    export_clip(clip=make_clip(tmp_path, "small_bpe"), folder=tmp_path / "model", card=CARD)
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) > 3 and set(modes.values()) == {modes["README.md"]}


def test_half_precision_halves_the_weights(tmp_path: Path):
    clip = make_clip(tmp_path, "small_bpe")
    export_clip(clip=clip, folder=tmp_path / "model", card=CARD, dtype=torch.float16, transformers=False)
    stored = load_file(tmp_path / "model" / "open_clip_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert next(clip.towers.parameters()).dtype == torch.float32  # the model itself is unchanged
    again = load_clip(f"local-dir:{tmp_path / 'model'}")
    text = again.towers.encode_text(again.tokenize(TEXTS))
    torch.testing.assert_close(text, clip.towers.encode_text(clip.tokenize(TEXTS)), atol=5e-3, rtol=0)


def test_shared_and_strided_tensors_are_written(tmp_path: Path):
    clip = make_clip(tmp_path, "small_bpe")
    model = clip.towers.model
    model.transformer.resblocks[1].ln_1 = model.transformer.resblocks[0].ln_1
    model.text_projection = torch.nn.Parameter(model.text_projection.detach().T.contiguous().T)
    export_clip(clip=clip, folder=tmp_path / "model", card=CARD)
    stored = load_file(tmp_path / "model" / "open_clip_model.safetensors")
    assert set(stored) == set(model.state_dict())
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


def test_a_failed_export_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clip, folder = make_clip(tmp_path, "small_bpe"), tmp_path / "run" / "model"
    export_clip(clip=clip, folder=folder, card=CARD)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(**_) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hub, "write_transformers", full_disk)
        with pytest.raises(OSError, match="No space left"):
            export_clip(clip=clip, folder=folder, card=dataclasses.replace(CARD, run=changed(steps=8)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]

    export_clip(clip=clip, folder=folder, card=dataclasses.replace(CARD, run=changed(steps=8)), transformers=False)
    assert "- Steps: 8\n" in (folder / "README.md").read_text()
    assert not (folder / "config.json").exists()  # replaced, not mixed with the old files
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_other_files_are_not_replaced(tmp_path: Path):
    clip = make_clip(tmp_path, "small_bpe")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis holds files but no exported model"):
        export_clip(clip=clip, folder=tmp_path / "thesis", card=CARD)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    with pytest.raises(UserError, match="is a file"):
        export_clip(clip=clip, folder=tmp_path / "small_bpe.json", card=CARD)
