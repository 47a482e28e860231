"""Groups of a tower's parameters by depth, locks and rates by layer, and the modes that save memory."""

import json
from contextlib import contextmanager

import pytest
import torch
from open_clip.transform import PreprocessCfg
from small_models import CONFIG
from torch import nn
from transformers import AutoConfig, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from gkl_vl.errors import UserError
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.depth import depth_groups, lock, rate_scales
from gkl_vl.models.modes import checkpoint_activations, drop_patches, evaluating
from gkl_vl.models.pretrained import build_open_clip
from gkl_vl.models.student import Student
from gkl_vl.models.towers import OpenClipTowers, TransformersTowers
from gkl_vl.training.optim import clip_adamw

pytestmark = pytest.mark.usefixtures("one_thread")
DEEP = CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"layers": 3}, "text_cfg": CONFIG["text_cfg"] | {"layers": 2}}
CUSTOM = DEEP | {"custom_text": True, "init_logit_bias": -1.0}
RESNET = CONFIG | {
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}
}
TIMM_VIT = CONFIG | {"vision_cfg": {"image_size": 32, "timm_model_name": "test_vit", "timm_proj": "linear"}}
CONV = CONFIG | {"vision_cfg": {"image_size": 32, "timm_model_name": "test_resnet", "timm_proj": "linear"}}
KINDS = {"vit": DEEP, "custom text": CUSTOM, "resnet": RESNET, "timm vit": TIMM_VIT, "timm conv": CONV}
GROUPS = {"vit": (5, 4), "custom text": (5, 4), "resnet": (6, 3), "timm vit": (8, 3), "timm conv": (6, 3)}


@pytest.fixture
def build(tmp_path):
    """build(kind) -> a clip with random weights; equal in every call."""

    def build(kind: str):
        path = tmp_path / "model.json"
        path.write_text(json.dumps(KINDS[kind]))
        torch.manual_seed(0)
        return load_clip(str(path))

    return build


def transformers_towers(kind: str) -> TransformersTowers:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, text = size | {"image_size": 16, "patch_size": 8}, size | {"vocab_size": 50}
    if kind == "clip":
        return TransformersTowers(CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)))
    return TransformersTowers(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)))


def names_in(model: nn.Module, groups) -> list[set[str]]:
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [{name_of[parameter] for parameter in group} for group in groups]


# ---- groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_groups_hold_every_parameter_of_a_tower_once(build, kind):
    towers = build(kind).towers
    for side, parameters, count in zip(
        ("image", "text"), (towers.image_parameters(), towers.text_parameters()), GROUPS[kind], strict=True
    ):
        groups = depth_groups(towers, side)
        members = [parameter for group in groups for parameter in group]
        assert len(groups) == count and len(members) == len(set(members)) and set(members) == set(parameters)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_groups_of_transformers_models(kind):
    towers = transformers_towers(kind)
    image, text = (names_in(towers.model, depth_groups(towers, side)) for side in ("image", "text"))
    assert "vision_model.embeddings.patch_embedding.weight" in image[0] and len(image) == len(text) == 4
    assert image[1] == {name for name in names_in(towers.model, [towers.image_parameters()])[0] if ".layers.0." in name}
    assert "vision_model.post_layernorm.weight" in image[2] and "text_model.final_layer_norm.weight" in text[2]
    head = (
        {"visual_projection.weight"} if kind == "clip" else {n for n in image[3] if n.startswith("vision_model.head")}
    )
    assert image[3] == head and image[3]
    own = "text_projection.weight" if kind == "clip" else "text_model.head.weight"
    assert own in text[3] and sum(map(len, image)) == len(list(towers.image_parameters()))


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("unlocked", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["vit", "custom text"])
def test_locks_are_open_clips(build, kind, side, unlocked):
    ours, theirs = build(kind).towers, build(kind).towers
    lock(ours, side, unlocked_groups=unlocked)
    if side == "image":
        theirs.model.lock_image_tower(unlocked_groups=unlocked)
    else:
        theirs.model.lock_text_tower(unlocked_layers=unlocked)
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert "model.logit_scale" in trained and len(trained) < len(list(ours.named_parameters()))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_groups_of_text_towers_of_transformers(tmp_path, kind):
    """The embeddings beside the tokens' are in the first group as well."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoConfig.for_model(kind, vocab_size=60, max_position_embeddings=20, **sizes).save_pretrained(tmp_path / "text")
    text = {"hf_model_name": str(tmp_path / "text"), "hf_proj_type": "linear", "context_length": 8, "vocab_size": 60}
    model = build_open_clip(CONFIG | {"text_cfg": text}, "test", pretrained_text=False, allow_pickle=False)
    groups = names_in(model, depth_groups(OpenClipTowers(model), "text"))
    assert len(groups) == 4 and all("embeddings" in name for name in groups[0]) and len(groups[0]) >= 5
    assert all(".layer.0." in name for name in groups[1]) and "text.proj.weight" in groups[3]


def test_an_image_tower_of_unknown_depth_is_refused(tmp_path):
    vision = {"image_size": 32, "timm_model_name": "caformer_s18", "timm_proj": "linear"}
    (tmp_path / "model.json").write_text(json.dumps(CONFIG | {"vision_cfg": vision}))
    with pytest.raises(UserError, match="timm's MetaFormer does not say which of its layers is how deep: leave out"):
        depth_groups(load_clip(str(tmp_path / "model.json")).towers, "image")


def test_a_lock_of_nothing_is_refused(build):
    with pytest.raises(
        UserError, match="--unlocked-groups 4 leaves nothing to lock, the text tower has 4 groups .* 3,"
    ):
        lock(build("vit").towers, "text", unlocked_groups=4)


def test_rates_fall_by_layer_and_frozen_parameters_are_in_no_group(build):
    towers = build("vit").towers
    lock(towers, "image", unlocked_groups=3)
    model = Student(towers, embed_dim=12, teacher_dims=[7], mapped=("image", "text"))
    optimizer = clip_adamw(
        model, of_text=model.text_parameters(), lr=1.0, text_lr=0.5, wd=0.1, scales=rate_scales(towers, 0.5)
    )
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    rates = {name_of[p]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert set(rates) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {"image_map.weight": 1.0, "text_map.weight": 0.5, "towers.model.logit_scale": 1.0}
    expected |= {"towers.model.visual.proj": 1.0, "towers.model.visual.ln_post.bias": 0.5}
    expected |= {"towers.model.visual.transformer.resblocks.1.ln_1.weight": 0.25}
    expected |= {"towers.model.text_projection": 0.5, "towers.model.ln_final.weight": 0.25}
    expected |= {"towers.model.transformer.resblocks.0.ln_1.weight": 0.125}
    expected |= {"towers.model.token_embedding.weight": 0.0625, "towers.model.positional_embedding": 0.0625}
    assert {name: rates[name] for name in expected} == expected
    assert "towers.model.visual.transformer.resblocks.0.ln_1.weight" not in rates


# ---- modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [False, True])
def test_statistics_of_frozen_batch_norms_stay_on_request(build, fixed):
    clip = build("timm conv")
    lock(clip.towers, "image", unlocked_groups=2)
    model = Student(clip.towers, embed_dim=12, fixed_statistics=fixed)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    before = {name: norm.running_mean.clone() for name, norm in norms.items()}
    model.train()
    model(torch.rand(4, 3, 32, 32), clip.tokenize(["a"] * 4))
    moved = {name for name, norm in norms.items() if not torch.equal(norm.running_mean, before[name])}
    trained = {name for name, norm in norms.items() if norm.weight.requires_grad}
    assert trained and trained < set(norms)
    assert moved == (trained if fixed else set(norms))
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training and any(norm.training for norm in norms.values())


@contextmanager
def counted(towers):
    """The number of passes of each first block."""
    model, counts = towers.model, {"image": 0, "text": 0}
    blocks = {"image": getattr(model.visual, "trunk", model.visual), "text": getattr(model, "text", model).transformer}
    first = {side: next(m for n, m in part.named_modules() if n.endswith("s.0")) for side, part in blocks.items()}

    def count(side):
        counts[side] += 1

    handles = [module.register_forward_pre_hook(lambda *_, s=side: count(s)) for side, module in first.items()]
    yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["vit", "custom text", "timm vit"])
def test_checkpointed_activations_give_the_same_gradients(build, kind):
    results = []
    for checkpointed in (False, True):
        clip = build(kind)
        if checkpointed:
            checkpoint_activations(clip)
        model = Student(clip.towers, embed_dim=12).train()
        torch.manual_seed(3)
        with counted(clip.towers) as counts:
            output = model(torch.rand(3, 3, clip.image_size, clip.image_size), clip.tokenize(["a b", "c", "d"]))
            loss = (output["image"] @ output["text"].T * torch.rand(3, 3)).sum()
            loss.backward()
        results.append((loss, [p.grad for p in model.parameters() if p.grad is not None], dict(counts)))
    (loss, gradients, once), (same_loss, same_gradients, twice) = results
    assert {side: 2 * count for side, count in once.items()} == twice  # activations were computed again
    torch.testing.assert_close(same_loss, loss, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(same_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_checkpointed_activations_of_transformers_models(kind):
    """Beside a frozen first group, which a reentrant checkpoint would take for the end of the gradient."""
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        towers = transformers_towers(kind)
        lock(towers, "image", unlocked_groups=2)
        if checkpointed:
            checkpoint_activations(as_clip(towers))
        passes = []
        towers.model.text_model.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_, p=passes: p.append(1))
        towers.train()
        image = towers.encode_image(torch.rand(3, 3, 16, 16))
        text = towers.encode_text(torch.randint(2, 48, (3, 6)))
        (image @ text.T * torch.rand(3, 3)).sum().backward()
        gradients = {name: p.grad for name, p in towers.named_parameters() if p.grad is not None}
        results.append((gradients, len(passes)))
    (gradients, once), (same, twice) = results
    assert gradients.keys() == same.keys() and (once, twice) == (1, 2)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-5, atol=1e-7)


def as_clip(towers: TransformersTowers) -> Clip:
    return Clip(
        name="tiny",
        towers=towers,
        preprocess=PreprocessCfg(size=16),
        tokenize=lambda texts: torch.zeros(len(texts), 6, dtype=torch.long),
        hf_tokenizer=None,
        model_cfg=None,
    )


@pytest.mark.parametrize("kind", ["vit", "timm vit"])
def test_patches_are_dropped_in_training_alone(build, kind):
    clip = build(kind)
    with torch.no_grad():
        pixels = torch.rand(2, 3, clip.image_size, clip.image_size)
        whole = clip.towers.eval().encode_image(pixels)
        drop_patches(clip, 0.5)
        assert torch.equal(clip.towers.eval().encode_image(pixels), whole)
        tokens = []
        visual = clip.towers.model.visual
        blocks = visual.trunk.blocks if kind == "timm vit" else visual.transformer.resblocks
        blocks[0].register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0].shape[1]))
        first, second = (clip.towers.train().encode_image(pixels) for _ in range(2))
    patches = (clip.image_size // (visual.trunk.patch_embed.patch_size[0] if kind == "timm vit" else 8)) ** 2
    assert tokens == [1 + patches // 2] * 2 and not torch.equal(first, second)


def test_towers_that_cannot_are_refused_in_one_line(build):
    with pytest.raises(UserError, match="--grad-checkpointing: the ResNet of .* leave it out"):
        checkpoint_activations(build("resnet"))
    with pytest.raises(UserError, match="--patch-dropout 0.5: the image tower of .* is no ViT"):
        drop_patches(build("timm conv"), 0.5)
