"""Students of transformers: random weights from a config alone, and exports that transformers loads without this
package with the trained embeddings and the token ids of the training."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_clip_models as models
import torch
import transformers
from hub_server import loopback_hub, use_in_process
from huggingface_hub import ModelCard as HubCard
from open_clip.tokenizer import get_clean_fn
from PIL import Image
from safetensors.torch import load_file
from test_hub import CARD
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

import gkl_vl.models.clip as clip_module
from gkl_vl.errors import UserError
from gkl_vl.export import hub, transformers_format
from gkl_vl.export.cards import ClassifierCard, for_hub
from gkl_vl.export.hub import export_classifier, export_clip
from gkl_vl.export.push import push_to_hub
from gkl_vl.models.classifiers import load_classifier
from gkl_vl.models.clip import Clip, as_clip, load_clip
from gkl_vl.models.student import paired

FOLDERS = {"CLIPModel": models.clip_folder, "SiglipModel": models.siglip_folder}
FILES = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
FILES |= {"tokenizer.json", "tokenizer_config.json"}
KINDS = pytest.mark.parametrize("kind", FOLDERS)
TEXTS = [
    "it’s a “cat” & a ‘dog’",
    "fish &amp; chips, &quot;caf&eacute;&quot; &#8217;",
    "A PHOTO of a Cat!",
    "two\n\nlines -- and, (punctuation): a_b-c.d?",
    "Flag: São Tomé & Príncipe",
    "a very long text of a cat and a dog and a flag and a face and a heart",
    "",
]

# Loads exported folders with transformers, without this package. Arguments: folder of inputs, exports.
LOAD_WITHOUT_PACKAGE = """
import json, sys
from pathlib import Path
import numpy as np, torch, transformers
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

work = Path(sys.argv[1])
texts = json.loads((work / "texts.json").read_text())
images = [Image.open(path) for path in sorted(work.glob("*.png"))]
padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
for folder in sys.argv[2:]:
    tokens = AutoTokenizer.from_pretrained(folder)(texts, **padded)
    # PIL resizes as in training; the default backend rounds differently.
    images_of = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = images_of(images, return_tensors="pt").pixel_values
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    code = (Path(folder) / "README.md").read_text().split("```python")[1].split("```")[0]
    card = {}
    exec(code.replace("path/to/this/folder", folder), card)
    card["processor"].image_processor = images_of
    with torch.no_grad():
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(**tokens).pooler_output
        result = card["model"](**card["processor"](text=texts, images=images, **padded))
    out = {"image": normalize(image, dim=1), "text": normalize(text, dim=1)}
    out |= {"pixels": pixels, "ids": tokens.input_ids, "scale": model.logit_scale}
    out |= {"card_image": result.image_embeds, "card_text": result.text_embeds}
    np.savez(Path(folder).with_suffix(".npz"), **{key: value.detach().numpy() for key, value in out.items()})
assert "gkl_vl" not in sys.modules
"""


def config_folder(folder: Path, kind: str) -> Path:
    """A folder of transformers without weights."""
    FOLDERS[kind](folder)
    (folder / "model.safetensors").unlink()
    return folder


def trained(folder: Path, kind: str) -> Clip:
    """A student with other weights than the initial ones, as after training: some tensors in channels_last."""
    torch.manual_seed(0)
    student = load_clip(f"transformers:{config_folder(folder, kind)}", random_weights=True)
    with torch.no_grad():
        for parameter in student.towers.parameters():  # initial biases are zero, which would hide a missing one
            parameter.add_(0.05 * torch.randn_like(parameter))
    student.towers.to(memory_format=torch.channels_last).eval()
    return student


@torch.no_grad()
def embeddings(clip: Clip, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    clip.towers.eval()
    return clip.towers.encode_image(pixels), clip.towers.encode_text(clip.tokenize(TEXTS))


def edit(path: Path, section: str | None = None, **values) -> None:
    content = json.loads(path.read_text())
    (content if section is None else content[section]).update(values)
    path.write_text(json.dumps(content))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- random weights


@KINDS
def test_random_weights_need_a_config_alone_and_follow_the_seed(tmp_path: Path, kind: str):
    folder = config_folder(tmp_path / "m", kind)
    edit(folder / "config.json", dtype="bfloat16")  # of the weights that the folder once had

    def build(seed: int) -> Clip:
        torch.manual_seed(seed)
        return load_clip(f"transformers:{folder}", random_weights=True)

    first, again, other = (build(seed).towers.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = [name for name in first if not torch.equal(first[name], other[name])]
    assert {"layers", "embeddings"} <= {part for name in differing for part in name.split(".")}
    torch.manual_seed(1)
    reference = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32)
    others = {name for name, t in reference.state_dict().items() if not torch.equal(first[f"model.{name}"], t)}
    assert others == ({"logit_scale", "logit_bias"} if kind == "SiglipModel" else set())
    assert kind == "CLIPModel" or (first["model.logit_scale"].exp().item(), first["model.logit_bias"]) == (
        pytest.approx(10),
        -10,
    )
    assert {tensor.dtype for tensor in first.values() if tensor.is_floating_point()} == {torch.float32}
    with pytest.raises(UserError, match="holds no weights: expected model.safetensors"):
        load_clip(f"transformers:{folder}")


@KINDS
def test_random_weights_keep_tokenizer_and_preprocessing_and_ignore_weights(tmp_path: Path, kind: str):
    folder = FOLDERS[kind](tmp_path / "m")
    whole = load_clip(f"transformers:{folder}")
    (folder / "model.safetensors").unlink()  # not overwritten: `whole` is mapped from it
    (folder / "model.safetensors").write_bytes(b"damaged")
    student = load_clip(f"transformers:{folder}", random_weights=True)
    assert student.preprocess == whole.preprocess and student.embed_dim == whole.embed_dim
    assert torch.equal(student.tokenize(TEXTS), whole.tokenize(TEXTS))
    pixels = torch.rand(2, 3, 32, 32)
    image, text = embeddings(student, pixels)
    assert image.shape == (2, student.embed_dim) and text.shape == (len(TEXTS), student.embed_dim)
    assert (image - embeddings(whole, pixels)[0]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["transformers:org/name", "hf-hub:org/name"])
def test_weights_of_a_hub_name_are_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    folder, wanted = tmp_path / "m", []
    if name.startswith("transformers:"):
        config_folder(folder, "CLIPModel")
    else:
        models.tiny_folder(folder, weights=None)

    def fetch(repo, *, files, pickles, allow_pickle):
        wanted.append((repo, {*files, *(pickles if allow_pickle else ())}))
        return folder

    monkeypatch.setattr(clip_module, "fetch", fetch)
    assert load_clip(name, random_weights=True, allow_pickle=True).embed_dim == 24
    with pytest.raises(UserError, match="holds no weights"):
        load_clip(name)
    assert wanted[0] == ("org/name", {"*.json", "*.txt", "*.model"})
    assert wanted[1] == ("org/name", {"*.json", "*.txt", "*.model", "*.safetensors"})


def test_open_clips_folders_have_random_weights_and_names_have_them_anyway(tmp_path: Path):
    folder = models.tiny_folder(tmp_path / "m", weights=None)
    stored = load_clip(f"local-dir:{models.tiny_folder(tmp_path / 'whole')}")
    student = load_clip(f"local-dir:{folder}", random_weights=True)
    assert student.preprocess == stored.preprocess and student.model_cfg == stored.model_cfg
    pixels = torch.rand(2, 3, 32, 32)
    assert (embeddings(student, pixels)[0] - embeddings(stored, pixels)[0]).abs().max() > 0.01
    states = []
    for random_weights in (False, True):
        torch.manual_seed(0)
        states.append(load_clip("emoji-student", random_weights=random_weights).towers.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    teacher = load_clip("bundled").towers.log_scale()
    assert load_clip("bundled", random_weights=True).towers.log_scale() != teacher


def test_a_pretrained_text_tower_is_random_too(tmp_path: Path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tower = transformers.BertConfig(vocab_size=4096, pad_token_id=0, max_position_embeddings=8, **size)
    tower.save_pretrained(tmp_path / "t")  # without weights
    text = {"context_length": 8, "hf_model_name": str(tmp_path / "t"), "hf_proj_type": "linear"}
    text |= {"hf_tokenizer_name": "gkl-vl/clip-bpe-4096"}
    (tmp_path / "x.json").write_text(json.dumps(models.TINY | {"text_cfg": text}))
    with pytest.raises(UserError, match="holds no weights"):
        load_clip(str(tmp_path / "x.json"))
    assert load_clip(str(tmp_path / "x.json"), random_weights=True).embed_dim == 24


@pytest.mark.parametrize("name", ["transformers:{folder}", "ViT-B-32", "bundled"])
def test_random_weights_with_pretrained_contradict(tmp_path: Path, name: str):
    with pytest.raises(UserError, match="pretrained 'openai' does not go with random weights .*: leave one out"):
        load_clip(name.format(folder=tmp_path), "openai", random_weights=True)


@pytest.mark.parametrize("random_weights", [False, True])
@pytest.mark.parametrize(
    "file, section, values, message",
    [
        ("config.json", None, {"model_type": "siglip2"}, "is a NaFlex SigLIP 2, whose images have no fixed size"),
        ("config.json", "text_config", {"projection_size": 16}, "projection_size in .* is 16, .*hidden_size is 32"),
        (
            "config.json",
            "vision_config",
            {"vision_use_head": False},
            "vision_use_head in .* is false, .*: take",
        ),
        ("config.json", "text_config", {"vocab_size": 100}, "but the text tower has 100 token embeddings"),
        ("config.json", "text_config", {"vocab_size": 9000}, "but the text tower has 9000 token embeddings"),
        ("preprocessor_config.json", None, {"size": {"height": 48, "width": 48}}, "resizes to .*48.* only"),
        ("tokenizer_config.json", None, {"auto_map": {"AutoTokenizer": "x"}}, "asks for Python code of its own"),
    ],
)
def test_checks_of_the_folder_apply_to_random_weights(tmp_path, random_weights, file, section, values, message):
    folder = models.siglip_folder(tmp_path / "m")
    edit(folder / file, section, **values)
    if random_weights:
        (folder / "model.safetensors").unlink()
    elif "vocab_size" in values:
        message = "do not fit"  # the weights are compared first
    with pytest.raises(UserError, match=message) as caught:
        load_clip(f"transformers:{folder}", random_weights=random_weights)
    assert "\n" not in str(caught.value)


# ---- exports


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, tuple[Clip, Path, dict[str, np.ndarray], list]]:
    """kind -> student, its export, arrays that a process without this package computed from it, input images."""
    work = tmp_path_factory.mktemp("exports")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in [(32, 32), (40, 72)]]
    for index, image in enumerate(images):
        image.save(work / f"{index}.png")
    (work / "texts.json").write_text(json.dumps(TEXTS))
    students = {kind: trained(work / f"config of {kind}", kind) for kind in FOLDERS}
    for kind, student in students.items():
        student.tokenize(TEXTS)  # which leaves its padding in the tokenizer
        export_clip(clip=student, folder=work / kind, card=CARD)
    command = [sys.executable, "-c", LOAD_WITHOUT_PACKAGE, str(work), *(str(work / kind) for kind in students)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {k: (student, work / k, dict(np.load(work / f"{k}.npz")), images) for k, student in students.items()}


@KINDS
def test_transformers_alone_computes_the_trained_embeddings(exports, kind: str):
    student, _, theirs, images = exports[kind]
    pixels = torch.stack([student.image_transform()(image) for image in images])
    image, text = (tensor.numpy() for tensor in embeddings(student, pixels))
    assert theirs["ids"].tolist() == student.tokenize(TEXTS).tolist()
    np.testing.assert_allclose(theirs["pixels"], pixels, atol=1e-6)
    for prefix in ("", "card_"):  # by AutoModel with AutoTokenizer, and as the card says
        np.testing.assert_allclose(theirs[f"{prefix}image"], image, atol=1e-6)
        np.testing.assert_allclose(theirs[f"{prefix}text"], text, atol=1e-6)
    assert theirs["scale"].shape == student.towers.model.logit_scale.shape
    assert theirs["scale"].item() == student.towers.log_scale().item()
    assert np.abs(image[0] - image[1]).max() > 1e-3 and np.abs(text[0] - text[1]).max() > 1e-3


@KINDS
def test_the_package_loads_an_export_and_a_run(exports, tmp_path: Path, kind: str):
    student, folder, _, _ = exports[kind]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(folder)
    expected = embeddings(student, pixels := torch.rand(2, 3, 32, 32))
    for name in (f"transformers:{folder}", str(tmp_path / "run")):
        again = load_clip(name)
        assert again.name == name and again.preprocess == student.preprocess
        assert torch.equal(again.tokenize(TEXTS), student.tokenize(TEXTS))  # cleaned twice
        torch.testing.assert_close(embeddings(again, pixels), expected, atol=1e-6, rtol=0)
    export_clip(clip=load_clip(f"transformers:{folder}"), folder=tmp_path / "again", card=CARD)
    assert contents(tmp_path / "again") == contents(folder)


@KINDS
def test_an_export_holds_no_more_than_it_needs_and_no_path(exports, kind: str):
    _, folder, _, _ = exports[kind]
    assert set(contents(folder)) == FILES
    assert not any(str(folder.parent).encode() in content for content in contents(folder).values())
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 12
    assert len(tokenizer("a cat").input_ids) < 12  # no padding of earlier calls


@KINDS
def test_an_export_leaves_the_student_as_it_is(tmp_path: Path, kind: str):
    student = trained(tmp_path / "config", kind)
    model = student.towers.model
    model.train()

    def facts() -> tuple:
        tensors = [(t.data_ptr(), t.dtype, t.device, t.stride(), t.sum().item()) for t in model.state_dict().values()]
        tokenizer = student.hf_tokenizer
        return model.config.to_dict(), tensors, tokenizer.init_kwargs, tokenizer.model_input_names, model.training

    before, ids = facts(), student.tokenize(TEXTS)
    assert not all(tensor.is_contiguous() for tensor in model.state_dict().values())
    export_clip(clip=student, folder=tmp_path / "model", card=CARD, dtype=torch.float16)
    assert facts() == before and torch.equal(student.tokenize(TEXTS), ids)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_precisions(tmp_path: Path, kind: str, dtype: torch.dtype):
    student = trained(tmp_path / "config", kind)
    export_clip(clip=student, folder=tmp_path / "model", card=CARD, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()} == {dtype}
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "model")
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    again, pixels = load_clip(f"transformers:{tmp_path / 'model'}"), torch.rand(2, 3, 32, 32)
    assert next(again.towers.parameters()).dtype == torch.float32
    tolerance = 5e-3 if dtype == torch.float16 else 4e-2
    torch.testing.assert_close(embeddings(again, pixels), embeddings(student, pixels), atol=tolerance, rtol=0)


@KINDS
def test_a_scale_has_its_shape_without_fsdp(tmp_path: Path, kind: str):
    student = trained(tmp_path / "config", kind)
    scale = student.towers.model.logit_scale
    shape, value = scale.shape, scale.item()
    scale.data = scale.data.reshape(1)
    export_clip(clip=student, folder=tmp_path / "model", card=CARD)
    again = load_clip(f"transformers:{tmp_path / 'model'}").towers.model.logit_scale
    assert again.shape == shape and again.item() == value and scale.shape == (1,)


@KINDS
def test_the_card_is_of_transformers(exports, kind: str):
    _, folder, _, _ = exports[kind]
    text = (folder / "README.md").read_text()
    data = HubCard(text).data.to_dict()
    assert data["library_name"] == "transformers" and data["tags"] == ["clip", "knowledge-distillation", "gkl"]
    assert f'{kind}.from_pretrained("path/to/this/folder")' in text and "open_clip" not in text
    named = for_hub(text, "me/tiny", None)
    assert f'{kind}.from_pretrained("me/tiny")' in named and "path/to" not in named


# ---- folders


def test_a_failed_export_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    student, folder = trained(tmp_path / "config", "CLIPModel"), tmp_path / "run" / "model"
    export_clip(clip=student, folder=folder, card=CARD)
    before, written = contents(folder), []

    def full_disk(tokenizer, scratch) -> None:
        written.extend(path.name for path in scratch.iterdir())
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        student.towers.model.logit_scale.fill_(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(transformers_format, "save_tokenizer", full_disk)
        with pytest.raises(OSError, match="No space left"):
            export_clip(clip=student, folder=folder, card=CARD)
    assert "model.safetensors" in written and contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    export_clip(clip=student, folder=folder, card=CARD)
    assert load_file(folder / "model.safetensors")["logit_scale"] == 1


def test_an_export_replaces_one_of_the_other_library_whole(tmp_path: Path):
    student, folder = trained(tmp_path / "config", "CLIPModel"), tmp_path / "run" / "model"
    export_clip(clip=load_clip("emoji-student"), folder=folder, card=CARD)
    assert load_clip(str(tmp_path / "run")).model_cfg is not None  # of both formats a run's is open_clip's
    export_clip(clip=student, folder=folder, card=CARD)
    assert not (folder / "open_clip_config.json").exists() and load_clip(f"transformers:{folder}").embed_dim == 24


@pytest.mark.parametrize("file, content", [("thesis.tex", "years"), ("config.json", '{"model_type": "clip"}')])
def test_other_files_are_not_replaced(tmp_path: Path, file: str, content: str):
    student = trained(tmp_path / "config", "CLIPModel")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / file).write_text(content)
    with pytest.raises(UserError, match="mine holds files but no exported model: name another folder or empty it"):
        export_clip(clip=student, folder=tmp_path / "mine", card=CARD)
    assert contents(tmp_path / "mine") == {file: content.encode()}


def test_a_push_sends_an_export_as_it_is(exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, folder, _, _ = exports["SiglipModel"]
    with loopback_hub() as served:
        use_in_process(served, monkeypatch)
        push_to_hub(folder=folder, repo_id="me/tiny")
        card = for_hub((folder / "README.md").read_text(), "me/tiny", None)
        assert served.files("me/tiny") == contents(folder) | {"README.md": card.encode()}
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        with pytest.raises(UserError, match="holds no open_clip_config.json, no CLIP of transformers, no classifier"):
            push_to_hub(folder=tmp_path, repo_id="me/tiny")


def test_a_classifier_and_a_clip_are_not_confused(exports, tmp_path: Path):
    classifier = load_classifier("resnet8x4", num_classes=3)
    card = ClassifierCard(student="resnet8x4", made="trained", teacher=None, data="x", run=CARD.run)
    export_classifier(classifier=classifier, folder=tmp_path / "run" / "model", card=card)
    assert hub._holds_classifier(tmp_path / "run" / "model")
    assert not clip_module.holds_transformers_config(tmp_path / "run" / "model")
    with pytest.raises(UserError, match="is a folder but not a finished run"):
        load_clip(str(tmp_path / "run"))
    assert not hub._holds_classifier(exports["CLIPModel"][1])


def test_models_of_unknown_configuration_are_refused(tmp_path: Path):
    teacher, student = load_clip("emoji-student"), trained(tmp_path / "config", "CLIPModel")
    wrapped = as_clip(teacher.towers.model, teacher.tokenize)
    for clip in (wrapped, paired(image_of=student, text_of=student)):
        with pytest.raises(UserError, match="has no known configuration, which an export needs: load it"):
            export_clip(clip=clip, folder=tmp_path / "model", card=CARD)
    padding = dataclasses.replace(student, preprocess=dataclasses.replace(student.preprocess, resize_mode="longest"))
    with pytest.raises(UserError, match="resize_mode 'longest', which no image processor of transformers has"):
        export_clip(clip=padding, folder=tmp_path / "model", card=CARD)
    assert not (tmp_path / "model").exists()


# ---- tokenizers


def gemma_folder(folder: Path, *, kept: bool) -> Path:
    """A SigLIP 2 of fixed size: a GemmaTokenizer, which pads on the left and has tokens of HTML and white space, and
    with `kept` a word, which is left by the cleaning."""
    models.siglip_folder(folder)
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special, plain = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], ["\n\n", "<b>", "</b>", "<table>"]
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=[*special, *plain, *(f"<0x{byte:02X}>" for byte in range(256))]
    )
    tokenizer.train_from_iterator(["a photo of a cat", "b table bold eos bos mask", "it s two lines"] * 20, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token | {"special": token["id"] < len(special)} for token in content["added_tokens"]]
    content["added_tokens"] = content["added_tokens"][: len(special) + len(plain)]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if kept:
        tokenizer.add_tokens([AddedToken("photo", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk", "mask")}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"} | names))
    edit(folder / "config.json", "text_config", vocab_size=400)
    return folder


@pytest.mark.parametrize("kept", [False, True])
def test_tokens_that_the_cleaning_removes_are_not_found_in_a_text(tmp_path: Path, kept: bool):
    student = load_clip(f"transformers:{gemma_folder(tmp_path / 'config', kept=kept)}", random_weights=True)
    export_clip(clip=student, folder=tmp_path / "model", card=CARD)
    expected = student.tokenize(texts := [*TEXTS, "a <b>bold</b> Photo", "<eos> a cat <bos>", "<table>", "photo"])
    assert expected[-1, 0] == 0 and expected[-1, -1] == 1  # padded on the left, as its class does
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.tolist() == expected.tolist()
    assert load_clip(f"transformers:{tmp_path / 'model'}").tokenize(texts).tolist() == expected.tolist()


def test_a_tokenizer_in_python_is_exported_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture):
    """It has no steps of a tokenizer file: this package cleans before it, transformers alone does not."""
    folder = config_folder(tmp_path / "config", "SiglipModel")
    (folder / "tokenizer.json").unlink()
    words = ["<cls>", "<pad>", "<eos>", "<unk>", "a", "cat", "CAT", "it’s", "its"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "EsmTokenizer"}))
    edit(folder / "config.json", "text_config", vocab_size=len(words))
    student = load_clip(f"transformers:{folder}", random_weights=True)
    assert not student.hf_tokenizer.is_fast
    export_clip(clip=student, folder=tmp_path / "model", card=CARD)
    assert "has no tokenizer.json" in capsys.readouterr().err
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert type(tokenizer).__name__ == "EsmTokenizer" and not (tmp_path / "model" / "tokenizer.json").exists()
    expected = student.tokenize(["a CAT", "it’s a cat!"])
    clean = [get_clean_fn("canonicalize")(text) for text in ("a CAT", "it’s a cat!")]
    tokens = tokenizer(clean, padding="max_length", truncation=True, return_tensors="pt")
    assert list(tokens) == ["input_ids"] and torch.equal(tokens.input_ids, expected)
    again = load_clip(f"transformers:{tmp_path / 'model'}")
    assert torch.equal(again.tokenize(["a CAT", "it’s a cat!"]), expected)
    assert student.hf_tokenizer.model_input_names == ["input_ids", "attention_mask"]
