"""CLIPs of open_clip and transformers load completely or fail with one line, and keep their own preprocessing."""

import json
import pickle
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from gkl_vl.assets.build_tokenizer import build
from gkl_vl.errors import UserError
from gkl_vl.models.clip import MODEL_CONFIGS, list_students, load_clip, resize
from gkl_vl.models.modes import freeze
from gkl_vl.models.student import Student
from gkl_vl.models.towers import clamp_scale

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def tiny_folder(folder: Path, *, weights: str | None = "open_clip_model.safetensors") -> Path:
    folder.mkdir()
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear", "resize_mode": "squash"}
    config = {"model_cfg": TINY, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    state = open_clip.CLIP(**TINY).state_dict()
    if weights is not None and weights.endswith(".safetensors"):
        save_file(state, folder / weights)
    elif weights is not None:
        torch.save(state, folder / weights)
    return folder


def random_image(width: int, height: int) -> Image.Image:
    torch.manual_seed(5)
    # smooth, as photographs are: resizing algorithms differ most on noise
    coarse = torch.rand(1, 3, 6, 6)
    pixels = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())


# ---- open_clip


@pytest.mark.parametrize("name", ["ViT-T-16", "FastViT-T8", "emoji-student", "emoji-teacher"])
def test_the_bundled_students_embed(name):
    assert name in list_students()
    clip = load_clip(name)
    clip.towers.eval()
    size = clip.image_size
    with torch.no_grad():
        image = clip.towers.encode_image(clip.prepare(torch.zeros(1, 3, size, size, dtype=torch.uint8)))
        text = clip.towers.encode_text(clip.tokenize(["a cat"]))
    assert image.shape == text.shape == (1, clip.embed_dim)
    assert image.norm().item() == pytest.approx(1, abs=1e-5)
    assert clip.towers.log_scale().exp().item() == pytest.approx(1 / 0.07, rel=1e-4)


def test_every_config_in_the_folder_is_tested():
    assert set(list_students()) == {"ViT-T-16", "FastViT-T8", "emoji-student", "emoji-teacher"}
    assert {path.suffix for path in MODEL_CONFIGS.iterdir()} == {".json"}


def test_the_demos_student_has_at_most_a_quarter_of_the_teachers_image_tower():
    student, teacher = (
        sum(p.numel() for p in load_clip(name).towers.image_parameters()) for name in ("emoji-student", "emoji-teacher")
    )
    assert 4 * student <= teacher


def test_vit_t_16_has_the_size_of_clip_kds():
    clip = load_clip("ViT-T-16")
    image = sum(p.numel() for p in clip.towers.image_parameters())
    # DeiT-Ti: 12 blocks, patches, positions, class token, three norms, and a projection 192 x 512 for its head
    block = 12 * 192**2 + 9 * 192 + 4 * 192
    rest = 3 * 16**2 * 192 + 197 * 192 + 192 + 2 * 2 * 192 + 192 * 512
    assert image == 12 * block + rest
    assert clip.embed_dim == 512 and clip.image_size == 224


def test_a_json_config_is_a_model(tmp_path):
    path = tmp_path / "tiny-from-json.json"
    path.write_text(json.dumps(TINY))
    clip = load_clip(str(path))
    assert clip.embed_dim == 24 and clip.model_cfg["vision_cfg"]["width"] == 32
    with pytest.raises(UserError, match="nowhere.json' does not exist"):
        load_clip("nowhere.json")


def test_a_folder_keeps_its_weights_and_its_preprocessing(tmp_path):
    folder = tiny_folder(tmp_path / "m")
    clip = load_clip(f"local-dir:{folder}")
    clip.towers.eval()
    reference, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    reference.eval()
    image = random_image(40, 60)
    assert torch.equal(clip.image_transform()(image), transform(image))
    with torch.no_grad():
        pixels = transform(image)[None]
        assert torch.equal(clip.towers.encode_image(pixels), reference.encode_image(pixels, normalize=True))
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a cat"])
        assert torch.equal(clip.tokenize(["a cat"]), tokens)
        assert torch.equal(clip.towers.encode_text(tokens), reference.encode_text(tokens, normalize=True))


@pytest.mark.parametrize("texts", [1, 3, 4, 11])
def test_texts_by_length_have_the_embeddings_and_the_gradient_of_whole_ones(texts):
    torch.manual_seed(0)
    clip = load_clip("emoji-student")
    words = [2, 9, 4, 1, 12, 1, 7, 3, 3, 40, 5]
    tokens, seen = clip.tokenize(["cat " * count for count in words[:texts]]), []
    clip.towers.model.ln_final.register_forward_hook(lambda module, args, output: seen.append(output.shape[:2]))
    results = []
    for encode in (clip.towers.encode_text, clip.towers.encode_text_by_length):
        clip.towers.zero_grad()
        text = encode(tokens)
        (text * torch.linspace(-1, 1, text.shape[1])).square().sum().backward()
        named = clip.towers.named_parameters()
        results.append((text.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}))
    (want, gradients), (got, others) = results
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == others.keys() and any("positional" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)
    lengths = {1: [(1, 4)], 3: [(1, 4), (1, 6), (1, 11)], 4: [(1, 3), (1, 4), (1, 6), (1, 11)]}
    lengths[11] = [(3, 4), (3, 6), (3, 11), (2, 24)]  # the last text is longer than the context
    assert seen == [(texts, 24), *lengths[texts]]


def test_texts_of_a_tower_with_other_attention_or_pooling_are_not_shortened():
    towers = (clip := load_clip("emoji-student")).towers
    tokens, seen = clip.tokenize(["cat", "a cat", "cat cat cat cat"]), []
    towers.model.ln_final.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    towers.model.text_pool_type = "last"
    towers.encode_text_by_length(tokens)
    towers.model.text_pool_type = "argmax"
    towers.model.attn_mask = None
    towers.encode_text_by_length(tokens)
    assert seen == [24, 24]


@pytest.mark.parametrize("side", [32, 50, 96])
def test_prepare_is_the_evaluation_transform_of_a_square_image(tmp_path, side):
    clip = load_clip(f"local-dir:{tiny_folder(tmp_path / 'm')}")
    image = random_image(side, side)
    views = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    expected = clip.image_transform()(image)
    # PIL rounds to whole levels after each pass over an axis: at most a level or two, over a std of 0.5
    tolerance = 1e-5 if side == 32 else 3 / 255 / 0.5
    assert (clip.prepare(views)[0] - expected).abs().max() < tolerance


def test_resizing_to_the_same_size_is_exact():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal((resize(images, 8) * 255).round().byte(), images)


# ---- errors


def test_a_folder_without_weights_is_refused(tmp_path):
    folder = tiny_folder(tmp_path / "m", weights=None)
    with pytest.raises(UserError, match="holds no weights: expected open_clip_model.safetensors"):
        load_clip(f"local-dir:{folder}")


def test_pickled_weights_need_allow_pickle(tmp_path):
    folder = tiny_folder(tmp_path / "m", weights="open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="open_clip_pytorch_model.bin is a pickle.*--allow-pickle"):
        load_clip(f"local-dir:{folder}")
    assert load_clip(f"local-dir:{folder}", allow_pickle=True).embed_dim == 24


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_is_never_executed(tmp_path):
    folder = tiny_folder(tmp_path / "m", weights=None)
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "executed"), protocol=2))
    for allow in (False, True):
        with pytest.raises(UserError):
            load_clip(f"local-dir:{folder}", allow_pickle=allow)
    assert not (tmp_path / "executed").exists()


def test_weights_of_another_shape_are_refused(tmp_path):
    folder = tiny_folder(tmp_path / "m")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 16
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"of another shape \(text_projection has \[16, 24\], not \[16, 16\]"):
        load_clip(f"local-dir:{folder}")


@pytest.mark.parametrize(
    "name, pretrained, message",
    [
        ("ViT-Q-99", None, "unknown model 'ViT-Q-99': take one of FastViT-T8, ViT-T-16"),
        ("ViT-B-32", "no_such_tag", "unknown tag 'no_such_tag' for 'ViT-B-32': take a file or one of openai"),
        ("local-dir:nowhere", None, "folder 'nowhere' of 'local-dir:nowhere' does not exist"),
        ("local-dir:nowhere", "openai", "carries its own weights"),
        ("hf-hub:org/surely-nothing", None, "'org/surely-nothing' could not be fetched"),
        ("transformers:org/surely-nothing", None, "'org/surely-nothing' could not be fetched"),
        ("ViT-B-32", "openai", "weights 'openai' of 'ViT-B-32' could not be fetched"),
    ],
)
def test_a_failed_load_is_one_line(name, pretrained, message):
    with pytest.raises(UserError, match=message) as caught:
        load_clip(name, pretrained)
    assert "\n" not in str(caught.value)


def test_a_plain_folder_gets_a_hint(tmp_path):
    with pytest.raises(UserError, match=r"is a folder but not a finished run: write local-dir:.* or transformers:"):
        load_clip(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no open_clip_config.json: try transformers:"):
        load_clip(f"local-dir:{tmp_path}")


# ---- transformers

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def clip_folder(folder: Path) -> Path:
    tokenizer = build()
    ids = {"bos_token_id": 4094, "eos_token_id": 4095, "pad_token_id": 0}
    text = TOWER | {"vocab_size": 4096, "max_position_embeddings": 12} | ids
    config = transformers.CLIPConfig(
        text_config=text, vision_config=TOWER | {"image_size": 32, "patch_size": 16}, projection_dim=24
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 32}
    transformers.CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def siglip_folder(folder: Path) -> Path:
    tokenizer = build()
    ids = {"bos_token_id": 4094, "eos_token_id": 4095, "pad_token_id": 0}
    text = TOWER | {"vocab_size": 4096, "max_position_embeddings": 12, "projection_size": 32} | ids
    config = transformers.SiglipConfig(text_config=text, vision_config=TOWER | {"image_size": 32, "patch_size": 16})
    torch.manual_seed(0)
    transformers.SiglipModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("make", [clip_folder, siglip_folder])
def test_a_transformers_folder_embeds_as_transformers_does(tmp_path, make):
    folder = make(tmp_path / "m")
    clip = load_clip(f"transformers:{folder}")
    sent = pickle.loads(pickle.dumps(clip.tokenize))  # to a worker process
    assert torch.equal(sent(["a photo"]), clip.tokenize(["a photo"]))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    clip.towers.eval()
    image = random_image(40, 60)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=[image], return_tensors="pt").pixel_values
    assert (clip.image_transform()(image) - pixels[0]).abs().max() < 0.05  # PIL against torch's resizing
    tokens = clip.tokenize(["a cat", "an emoji of a very long dog and a flag of the world"])
    assert tokens.shape == (2, 12)
    with torch.no_grad():
        image_features = model.get_image_features(pixel_values=pixels).pooler_output
        text_features = model.get_text_features(input_ids=tokens).pooler_output
        torch.testing.assert_close(
            clip.towers.encode_image(pixels), torch.nn.functional.normalize(image_features, dim=1)
        )
        torch.testing.assert_close(clip.towers.encode_text(tokens), torch.nn.functional.normalize(text_features, dim=1))
    assert clip.embed_dim == image_features.shape[1] == text_features.shape[1]
    assert clip.towers.log_scale().item() == pytest.approx(model.logit_scale.item())
    has_bias = make is siglip_folder
    assert (clip.towers.bias() is not None) == has_bias
    assert len(list(clip.towers.image_parameters())) > 10
    assert clip.model_cfg is None and clip.hf_tokenizer is not None


def test_a_transformers_folder_of_something_else_is_refused(tmp_path):
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a .bert. model: only clip, siglip and SigLIP 2 of fixed size are"):
        load_clip(f"transformers:{tmp_path}")


def test_a_transformers_folder_without_weights_or_with_a_pickle(tmp_path):
    folder = clip_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights: expected model.safetensors"):
        load_clip(f"transformers:{folder}")
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="is a pickle"):
        load_clip(f"transformers:{folder}")


def test_a_transformers_folder_that_lacks_a_tensor_is_refused(tmp_path):
    folder = clip_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing \(visual_projection.weight\)"):
        load_clip(f"transformers:{folder}")


def test_a_transformers_folder_that_does_not_fit_is_one_line(tmp_path):
    folder = clip_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"projection_dim": 16}))
    with pytest.raises(UserError, match=r"text_projection.weight has \[24, 32\], not \[16, 32\]") as caught:
        load_clip(f"transformers:{folder}")
    assert "\n" not in str(caught.value)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "executed"), protocol=2))
    with pytest.raises(UserError, match="which could run code: save the state dict alone"):
        load_clip(f"transformers:{folder}", allow_pickle=True)
    assert not (tmp_path / "executed").exists()


# ---- in training


def test_a_frozen_teacher_has_no_gradient_and_evaluates():
    clip = freeze(load_clip("emoji-student"))
    assert not clip.towers.training and not any(p.requires_grad for p in clip.towers.parameters())


def test_the_scale_is_clamped_between_1_and_100():
    clip = load_clip("emoji-student")
    for value, expected in ((7.0, 100.0), (-2.0, 1.0), (3.0, 20.0855)):
        with torch.no_grad():
            clip.towers.log_scale().fill_(value)
        clamp_scale(clip.towers)
        assert clip.towers.log_scale().exp().item() == pytest.approx(expected, rel=1e-4)


def test_a_student_returns_what_the_loss_needs():
    clip = load_clip("emoji-student")
    model = Student(clip.towers, embed_dim=clip.embed_dim, teacher_dims=[7], mapped=("image", "text"))
    pixels = clip.prepare(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    output = model(pixels, clip.tokenize(["a", "b"]))
    assert set(output) == {"image", "text", "logit_scale", "mapped_image", "mapped_text"}
    assert output["mapped_image"].shape == (2, 7)
    assert output["mapped_text"].norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)
