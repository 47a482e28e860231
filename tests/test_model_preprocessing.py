"""Weights keep the preprocessing and the activation they were trained with, or the tag is asked for; an image
processor of transformers is read field by field and written so that both libraries compute the same pixels."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import open_clip
import pytest
import test_clip_models as models
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from safetensors.torch import save_file

from gkl_vl.errors import UserError
from gkl_vl.models import open_clip_weights
from gkl_vl.models.classifiers import load_classifier
from gkl_vl.models.clip import load_clip
from gkl_vl.models.open_clip_weights import Settings, find_weights, openai_checksums, settings_of
from gkl_vl.models.preprocessing import check_preprocess, from_image_processor, has_image_processor, to_image_processor

HALF = (0.5, 0.5, 0.5)
OPENAI = PreprocessCfg().mean


def weights_file(folder: Path, name: str = "weights.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**models.TINY).state_dict(), folder / name)
    return folder / name


def found(name: str, pretrained: str) -> Settings:
    cfg = open_clip.get_model_config(name)
    return find_weights(pretrained, name=name, tags_of=name, cfg=cfg, own=None, allow_pickle=False).settings


@pytest.fixture
def architecture(monkeypatch):
    """Registers `tiny`, an architecture whose tags are given, and returns its name."""

    def register(**tags: dict) -> str:
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", models.TINY)
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
        return "tiny"

    return register


# ---- weights by tag and file


@pytest.mark.parametrize(
    "name, mean, interpolation, resize_mode, quick_gelu",
    [
        ("ViT-B-16-SigLIP", HALF, "bicubic", "squash", False),
        ("ViT-B-16-SigLIP2-256", HALF, "bicubic", "squash", False),
        ("MobileCLIP2-S0", (0.0, 0.0, 0.0), "bilinear", "shortest", False),
        ("PE-Core-B-16", HALF, "bilinear", "squash", False),
        ("ViT-L-14-CLIPA", (0.485, 0.456, 0.406), "bilinear", "squash", False),
        ("ViT-H-14-378", OPENAI, "bicubic", "squash", True),
        ("RN50", OPENAI, "bicubic", "shortest", True),
    ],
)
def test_a_file_has_what_all_tags_agree_on(tmp_path, capsys, name, mean, interpolation, resize_mode, quick_gelu):
    path = weights_file(tmp_path)
    settings = found(name, str(path))
    cfg = settings.preprocess
    assert (cfg.mean, cfg.interpolation, cfg.resize_mode, settings.quick_gelu) == (
        *(mean, interpolation, resize_mode),
        quick_gelu,
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {path}: mean ") and line.endswith(f"(as all tags of {name})")


@pytest.mark.parametrize("name", ["ViT-L-14", "ViT-B-32", "ViT-H-14", "ViT-H-14-quickgelu"])
def test_a_file_whose_tags_differ_is_refused(tmp_path, name):
    path = weights_file(tmp_path)
    with pytest.raises(UserError, match=f"the tags of '{name}' differ: write TAG={path} with the tag") as caught:
        found(name, str(path))
    assert all(tag in str(caught.value) for tag in open_clip.list_pretrained_tags_by_model(name))
    assert "\n" not in str(caught.value)


def test_the_tag_answers(tmp_path):
    path = weights_file(tmp_path)
    half = found("ViT-L-14", f"laion2b_s32b_b82k={path}")
    assert half.preprocess.mean == half.preprocess.std == HALF and not half.quick_gelu
    assert found("ViT-L-14", f"openai={path}") == settings_of({}, quick_gelu=True)
    assert found("ViT-L-14", f"laion400m-e31={path}") == settings_of({}, quick_gelu=False)  # open_clip's spelling
    assert found("ViT-L-14-quickgelu", str(path)) == settings_of({}, quick_gelu=True)
    with pytest.raises(UserError, match="unknown tag 'laion' in 'laion=.*': 'ViT-L-14' has openai, "):
        found("ViT-L-14", f"laion={path}")
    with pytest.raises(UserError, match="'nowhere.pt' are no file"):
        found("ViT-L-14", "openai=nowhere.pt")


def test_the_offline_message_names_a_form_that_works(tmp_path):
    with pytest.raises(UserError, match="laion2b_s32b_b82k=PATH with the path of the downloaded file"):
        found("ViT-L-14", "laion2b_s32b_b82k")


def test_every_tag_has_open_clips_preprocessing():
    for name in open_clip.list_models():
        cfg = open_clip.get_model_config(name)
        for tag, settings in open_clip_weights._tags(name, cfg).items():
            expected = merge_preprocess_dict(PreprocessCfg(), open_clip.get_pretrained_cfg(name, tag))
            assert asdict(settings.preprocess) | {"size": 224} == expected, (name, tag)


def test_an_architecture_without_tags_keeps_the_default(tmp_path, capsys):
    path = weights_file(tmp_path)
    assert found("ViT-S-32", str(path)) == settings_of({}, quick_gelu=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("how", ["tag", "TAG=FILE", "file"])
def test_the_model_has_the_settings_of_its_weights(tmp_path, architecture, how):
    path = weights_file(tmp_path)
    values = {"mean": HALF, "std": HALF, "resize_mode": "squash", "interpolation": "bilinear", "quick_gelu": True}
    name = architecture(theirs=values | {"file": str(path)})
    clip = load_clip(name, {"tag": "theirs", "TAG=FILE": f"theirs={path}", "file": str(path)}[how])
    image = models.random_image(96, 48)
    expected = PreprocessCfg(size=32, mean=HALF, std=HALF, resize_mode="squash", interpolation="bilinear")
    torch.testing.assert_close(clip.image_transform()(image), image_transform_v2(expected, is_train=False)(image))
    assert clip.model_cfg["quick_gelu"] is True  # exported with the model
    reference = open_clip.create_model("tiny", pretrained=str(path), force_quick_gelu=True).eval()
    tokens = clip.tokenize(["a cat"])
    with torch.no_grad():
        ours = clip.towers.eval().encode_text(tokens)
        torch.testing.assert_close(ours, reference.encode_text(tokens, normalize=True))


def test_a_config_with_preprocessing_is_used(tmp_path):
    path = weights_file(tmp_path)
    config = tmp_path / "mine.json"
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": 0.5, "resize_mode": "squash", "interpolation": None}
    config.write_text(json.dumps({"model_cfg": models.TINY, "preprocess_cfg": preprocess}))
    for pretrained in (None, str(path)):
        cfg = load_clip(str(config), pretrained).preprocess
        assert (cfg.mean, cfg.std, cfg.resize_mode, cfg.interpolation) == ((0.1, 0.2, 0.3), HALF, "squash", "bicubic")


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_the_config_beside_a_file_is_used(tmp_path, architecture, capsys, quick_gelu):
    name = architecture(one={"quick_gelu": True}, two={"mean": HALF, "std": HALF})
    path = weights_file(tmp_path / "m", "open_clip_model.safetensors")
    content = {"model_cfg": models.TINY | {"quick_gelu": quick_gelu}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "m" / "open_clip_config.json").write_text(json.dumps(content))
    clip = load_clip(name, str(path))
    assert clip.preprocess.mean == (0.1, 0.2, 0.3) and bool(clip.model_cfg.get("quick_gelu")) == quick_gelu
    assert "open_clip_config.json)" in capsys.readouterr().err
    content["model_cfg"]["embed_dim"] = 25  # another architecture: it tells nothing about this file
    (tmp_path / "m" / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="the tags of 'tiny' differ"):
        load_clip(name, str(path))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_image_processor_beside_a_file_is_used(tmp_path, architecture, activation):
    name = architecture(one={"quick_gelu": True}, two={"mean": HALF, "std": HALF})
    path = weights_file(tmp_path / "m", "open_clip_model.safetensors")
    to_image_processor(PreprocessCfg(size=32, mean=HALF, std=HALF, resize_mode="squash")).save_pretrained(path.parent)
    config = {"model_type": "clip", "vision_config": {"image_size": 32, "hidden_act": activation}}
    (path.parent / "config.json").write_text(json.dumps(config))
    clip = load_clip(name, str(path))
    assert (clip.preprocess.mean, clip.preprocess.resize_mode) == (HALF, "squash")
    assert bool(clip.model_cfg.get("quick_gelu")) == (activation == "quick_gelu")


def test_openais_archive_is_known_by_its_checksum(tmp_path, architecture, monkeypatch):
    """A TorchScript archive runs when it is read, so any other is refused."""
    name = architecture(openai={"quick_gelu": True}, other={})
    path = tmp_path / "ViT.pt"
    torch.manual_seed(0)
    model = open_clip.CLIP(**models.TINY).eval()

    class Archive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("input_resolution", torch.tensor(32))
            for name, child in model.named_children():
                self.add_module(name, child)
            for name, parameter in model.named_parameters(recurse=False):
                self.register_parameter(name, parameter)

        def forward(self, x):
            return x

    with pytest.warns(FutureWarning):
        torch.jit.save(torch.jit.trace(Archive(), torch.zeros(1)), path)
    with pytest.raises(UserError, match="TorchScript archive is a program that runs when it is read"), pytest.warns():
        load_clip(name, f"openai={path}", allow_pickle=True)
    assert len(openai_checksums()) == 9
    known = {open_clip_weights._checksum(path)}
    monkeypatch.setattr(open_clip_weights, "openai_checksums", lambda: known)
    clip = load_clip(name, str(path), allow_pickle=True)
    assert clip.model_cfg["quick_gelu"] is True
    loaded = clip.towers.model.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())
    config, numbers = tmp_path / "x.json", "mean 0.4815 0.4578 0.4082, std 0.2686 0.2613 0.2758, bicubic, shortest"
    line = f"{path} has {numbers}, QuickGELU (tag openai, by its checksum), but "
    half = {"model_cfg": models.TINY | {"quick_gelu": True}, "preprocess_cfg": {"mean": 0.5, "std": 0.5}}
    for content, says in (
        (models.TINY | {"quick_gelu": False}, f"{numbers}, GELU"),
        (half, "mean 0.5 0.5 0.5, std 0.5"),
    ):
        config.write_text(json.dumps(content))
        with pytest.raises(UserError, match=re.escape(f"{line}{config} says {says}") + f".*: correct {config}$"):
            load_clip(str(config), str(path), allow_pickle=True)
    with pytest.raises(UserError, match=re.escape(f"{line}tag other says") + f".*: write {path} without the tag$"):
        load_clip(name, f"other={path}", allow_pickle=True)
    config.write_text(json.dumps(models.TINY))
    assert load_clip(str(config), str(path), allow_pickle=True).model_cfg["quick_gelu"] is True


@pytest.mark.parametrize(
    "preprocess, message",
    [
        ({"means": HALF}, "preprocess_cfg.means in f.json is unknown: remove it; known are size, mode, mean, std"),
        ({"mean": [0.5, 0.5]}, r"preprocess_cfg.mean in f.json is \[0.5, 0.5\]: expected three numbers"),
        ({"std": [0.5, 0.5, 0]}, "expected three positive numbers"),
        ({"interpolation": "lanczos"}, "preprocess_cfg.interpolation in f.json is 'lanczos': write one of bicubic"),
        ({"resize_mode": "crop"}, "preprocess_cfg.resize_mode in f.json is 'crop': write one of shortest"),
        ([1], "expected an object"),
    ],
)
def test_a_malformed_preprocess_cfg_is_refused(preprocess, message):
    with pytest.raises(UserError, match=message):
        check_preprocess(preprocess, "f.json")


@pytest.mark.parametrize("make", [models.tiny_folder, models.clip_folder])
def test_a_mean_of_levels_is_no_mean_of_pixels(tmp_path, make):
    folder, levels = make(tmp_path / "m"), [123.675, 116.28, 103.53]
    opened = make is models.tiny_folder
    name = f"{'local-dir' if opened else 'transformers'}:{folder}"
    path = folder / ("open_clip_config.json" if opened else "preprocessor_config.json")
    place = f"preprocess_cfg.mean in {path}" if opened else f"image_mean in the image processor of {name!r}"
    content = json.loads(path.read_text())
    content |= {"preprocess_cfg": {"mean": levels}} if opened else {"image_mean": levels}
    path.write_text(json.dumps(content))
    line = f"{place} is {levels} on pixels in [0, 1]: divide mean and std by 255"
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        load_clip(name)
    if not opened:  # levels are normalised by levels
        path.write_text(json.dumps(content | {"do_rescale": False, "image_std": [58.395, 57.12, 57.375]}))
        assert load_clip(name).preprocess.mean == pytest.approx((0.485, 0.456, 0.406))


# ---- classifiers by file


def test_a_file_for_an_architecture_of_timm_whose_tags_differ_is_refused(tmp_path):
    name = "timm:efficientnet_b0"
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=f"the tags of {name} differ: write {name}.TAG with the tag") as caught:
        load_classifier(name, num_classes=1000, weights=str(path))
    assert "mean 0.5 0.5 0.5, std 0.5 0.5 0.5 for ra4_e3600_r224_in1k" in str(caught.value)
    model = load_classifier(f"{name}.ra_in1k", num_classes=10).model
    save_file(model.state_dict(), path)
    assert load_classifier(f"{name}.ra_in1k", num_classes=10, weights=str(path)).mean == (0.485, 0.456, 0.406)
    resnet = load_classifier("timm:test_resnet", num_classes=3)
    save_file(resnet.model.state_dict(), path)
    assert load_classifier("timm:test_resnet", num_classes=3, weights=str(path)).mean == HALF  # all tags agree


# ---- transformers' image processors


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, (24, 24)])
@pytest.mark.parametrize("mean, std", [(HALF, HALF), (OPENAI, PreprocessCfg().std), ((0.0,) * 3, (1.0,) * 3)])
def test_writer_and_reader_agree_with_both_libraries(tmp_path, resize_mode, interpolation, size, mean, std):
    written = PreprocessCfg(size=size, mean=mean, std=std, interpolation=interpolation, resize_mode=resize_mode)
    assert has_image_processor(written)
    to_image_processor(written).save_pretrained(tmp_path)
    image, side = models.random_image(96, 48), size if isinstance(size, int) else size[0]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    read = from_image_processor(processor.to_dict(), image_size=side, source="it")
    assert read == PreprocessCfg(side, "RGB", mean, std, interpolation, resize_mode)
    expected = image_transform_v2(written, is_train=False)(image)
    torch.testing.assert_close(image_transform_v2(read, is_train=False)(image), expected)
    pixels = processor(images=[image], return_tensors="pt").pixel_values[0]
    assert (pixels - expected).abs().max() < 0.04  # torch's and PIL's resizing differ by a level or two
    assert (pixels - expected).abs().mean() < 0.005


SQUARE, SHORT = {"height": 32, "width": 32}, {"shortest_edge": 32}


@pytest.mark.parametrize(
    "fields, resize_mode",
    [
        ({"size": SQUARE, "crop_size": SQUARE, "do_center_crop": False}, "squash"),
        ({"size": SQUARE, "crop_size": SQUARE, "do_center_crop": True}, "squash"),
        ({"size": 32, "crop_size": 32}, "shortest"),
        ({"size": SHORT, "crop_size": SQUARE}, "shortest"),
        ({"size": SQUARE, "do_center_crop": False, "do_normalize": False}, "squash"),
        ({"size": SQUARE, "do_center_crop": False, "do_rescale": False, "image_mean": [127.5] * 3}, "squash"),
        ({"size": SQUARE, "do_center_crop": False, "rescale_factor": 1 / 127.5}, "squash"),
        ({"size": SHORT, "crop_size": SQUARE, "resample": 2}, "shortest"),
        ({"size": SHORT, "crop_size": SQUARE, "do_convert_rgb": False}, "shortest"),
    ],
)
def test_every_field_is_read(tmp_path, fields, resize_mode):
    folder = models.clip_folder(tmp_path / "m")
    transformers.CLIPImageProcessor(**fields).save_pretrained(folder)
    clip, image = load_clip(f"transformers:{folder}"), models.random_image(96, 48)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=[image], return_tensors="pt").pixel_values[0]
    difference = (clip.image_transform()(image) - pixels).abs() / pixels.std()
    assert clip.preprocess.resize_mode == resize_mode
    assert difference.mean() < 0.02 and difference.max() < 0.15


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"do_resize": False}, "does not resize .do_resize False.: set do_resize to true"),
        ({"resample": 1}, r"resizes with Lanczos \(resample 1\): only bilinear"),
        ({"resample": 0}, "resizes with nearest"),
        ({"size": {"shortest_edge": 36}}, "resizes to .*36.* then crops to 32 x 32: only shortest_edge 32"),
        ({"size": {"height": 36, "width": 36}}, "resizes to .*36.* then crops"),
        ({"size": {"height": 32, "width": 48}, "do_center_crop": False}, "resizes to .*48.* without a crop"),
        ({"size": {"longest_edge": 32}, "do_center_crop": False}, "resizes to .*longest_edge.* without a crop"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "resizes to .*longest_edge"),
        ({"do_center_crop": False}, "resizes to .'shortest_edge': 32. without a crop"),
        ({"crop_size": {"height": 28, "width": 28}}, "crops to .*28.*, the model takes 32 x 32 pixels"),
        ({"image_std": [0.5, 0.5]}, "image_std in .* expected three positive numbers"),
        ({"do_pad": True, "pad_size": SQUARE}, "(do_pad|pad_size) .* is not supported"),
        ({"crop_pct": 0.875}, "crop_pct 0.875 in .* is not supported"),
    ],
)
def test_what_open_clips_transform_does_not_do_is_refused(tmp_path, fields, message):
    folder = models.clip_folder(tmp_path / "m")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(UserError, match=message) as caught:
        load_clip(f"transformers:{folder}")
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_square_is_refused(tmp_path):
    cfg = models.TINY | {"vision_cfg": models.TINY["vision_cfg"] | {"image_size": [32, 48]}}
    (tmp_path / "wide.json").write_text(json.dumps(cfg))
    with pytest.raises(UserError, match="wide.json takes images of 32 x 48 pixels: only square models are supported"):
        load_clip(str(tmp_path / "wide.json"))
