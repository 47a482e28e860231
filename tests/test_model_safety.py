"""No Python of a model folder is run: a folder that asks for its own code is refused in one line, through every door;
nothing in the sources loads models, tokenizers or pickles past these checks."""

import ast
import json
from pathlib import Path

import pytest
import test_clip_models as models
from test_house import SOURCES

import gkl_vl.models.clip
from gkl_vl.errors import UserError
from gkl_vl.models.classifiers import load_classifier
from gkl_vl.models.clip import load_clip
from gkl_vl.models.pretrained import BUNDLED_TOKENIZER, BUNDLED_TOKENIZER_NAME, check_model_config

SMALL_BPE = models.TINY["text_cfg"] | {"vocab_size": 4096, "hf_tokenizer_name": BUNDLED_TOKENIZER_NAME}
HOSTILE = """
from pathlib import Path

Path(__file__).with_name("executed").touch()
"""


def plant(folder: Path, *, file: str, classes: dict[str, str]) -> None:
    """Adds Python that leaves a trace when it is imported, and an `auto_map` that asks for it, to a JSON file."""
    (folder / "hostile.py").write_text(HOSTILE + "".join(f"class {name}: pass\n" for name in classes.values()))
    path = folder / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    own = {kind: f"hostile.{name}" for kind, name in classes.items()}
    path.write_text(json.dumps(content | {"auto_map": own}))


def hostile_tokenizer(folder: Path, *, tokenizer_class: str = "HostileTokenizer") -> Path:
    folder.mkdir(exist_ok=True)
    for file in BUNDLED_TOKENIZER.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    plant(folder, file="tokenizer_config.json", classes={"AutoTokenizer": "HostileTokenizer"})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["hostile.HostileTokenizer", "hostile.HostileTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": tokenizer_class}))
    return folder


def open_clip_folder(folder: Path, tokenizer_kwargs: dict | None = None) -> Path:
    """A complete model folder of open_clip with a hostile tokenizer."""
    models.tiny_folder(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "org/any"}
    if tokenizer_kwargs is not None:
        config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = tokenizer_kwargs
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return hostile_tokenizer(folder)


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path, monkeypatch):
    """Answers yes to every question, and checks that no planted Python left its trace."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield
    assert not list(tmp_path.rglob("executed"))


def refused(name: str, message: str, pretrained: str | None = None) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_clip(name, pretrained, allow_pickle=True)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


# ---- open_clip's folders and configs


@pytest.mark.parametrize("tokenizer_class", ["HostileTokenizer", "CLIPTokenizer"])
@pytest.mark.parametrize("door", ["local-dir", "hf-hub", "run"])
def test_a_tokenizer_with_code_is_refused(tmp_path, monkeypatch, door, tokenizer_class):
    folder = tmp_path / "run" / "model"
    folder.parent.mkdir()
    hostile_tokenizer(open_clip_folder(folder), tokenizer_class=tokenizer_class)
    monkeypatch.setattr(gkl_vl.models.clip, "fetch", lambda *_, **__: folder)
    name = {"local-dir": f"local-dir:{folder}", "hf-hub": "hf-hub:org/any", "run": str(folder.parent)}[door]
    refused(name, "tokenizer_config.json asks for Python code of its own .auto_map., which is never run")


@pytest.mark.parametrize("door", ["local-dir", "hf-hub", "run"])
def test_a_config_cannot_trust_its_own_code(tmp_path, monkeypatch, door):
    folder = tmp_path / "run" / "model"
    folder.parent.mkdir()
    open_clip_folder(folder, {"trust_remote_code": True})
    monkeypatch.setattr(gkl_vl.models.clip, "fetch", lambda *_, **__: folder)
    name = {"local-dir": f"local-dir:{folder}", "hf-hub": "hf-hub:org/any", "run": str(folder.parent)}[door]
    refused(name, "text_cfg.tokenizer_kwargs.trust_remote_code in .*open_clip_config.json is not allowed: remove it")


@pytest.mark.parametrize("form", ["bare", "with preprocessing"])
@pytest.mark.parametrize("kwargs", [{"trust_remote_code": True}, None])
def test_a_json_config_cannot_run_code(tmp_path, form, kwargs):
    tokenizer = hostile_tokenizer(tmp_path / "tokenizer")
    cfg = models.TINY | {"text_cfg": SMALL_BPE | {"hf_tokenizer_name": str(tokenizer)}}
    if kwargs:
        cfg["text_cfg"]["tokenizer_kwargs"] = kwargs
    (tmp_path / "x.json").write_text(json.dumps(cfg if form == "bare" else {"model_cfg": cfg}))
    refused(
        str(tmp_path / "x.json"), "trust_remote_code in .*x.json is not allowed" if kwargs else "asks for Python code"
    )


@pytest.mark.parametrize("model_type", ["roberta", "hostile"])
def test_a_text_tower_with_code_is_refused(tmp_path, model_type):
    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps({"model_type": model_type}))
    plant(tower, file="config.json", classes={"AutoConfig": "HostileConfig", "AutoModel": "HostileModel"})
    cfg = models.TINY | {"text_cfg": {"hf_model_name": str(tower), "hf_tokenizer_name": BUNDLED_TOKENIZER_NAME}}
    (tmp_path / "x.json").write_text(json.dumps(cfg))
    refused(str(tmp_path / "x.json"), "tower/config.json asks for Python code of its own")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("trust_remote_code", True, "not allowed: remove it; allowed are clean, "),
        ("code_revision", "main", "not allowed"),
        ("tokenizer_file", "/etc/hosts", "not allowed"),
        ("bpe_path", "/etc/hosts", "not allowed"),
        ("reduction_mask", "syntax", "is 'syntax': write one of '', 'simple'"),
        ("clean", "upper", "is 'upper': write one of 'lower', 'whitespace', 'canonicalize'"),
        ("strip_sep_token", 1, "is 1: write one of True, False"),
    ],
)
def test_tokenizer_settings_are_an_allow_list(key, value, message):
    cfg = models.TINY | {"text_cfg": SMALL_BPE | {"tokenizer_kwargs": {key: value}}}
    with pytest.raises(UserError, match=f"text_cfg.tokenizer_kwargs.{key} in x.json (is )?{message}"):
        check_model_config(cfg, "x.json")


@pytest.mark.parametrize("architecture", ["hf-hub:org/any", "local-dir:/tmp", "no_such_net"])
def test_a_vision_tower_is_an_architecture_of_timm(architecture):
    cfg = models.TINY | {"vision_cfg": {"timm_model_name": architecture, "image_size": 32}}
    with pytest.raises(UserError, match=f"timm_model_name '{architecture}' in x.json is unknown to timm"):
        check_model_config(cfg, "x.json")


# ---- transformers' folders


@pytest.mark.parametrize(
    "file, classes",
    [
        ("config.json", {"AutoConfig": "HostileConfig", "AutoModel": "HostileModel"}),
        ("tokenizer_config.json", {"AutoTokenizer": "HostileTokenizer"}),
        ("preprocessor_config.json", {"AutoImageProcessor": "HostileProcessor"}),
        ("processor_config.json", {"AutoProcessor": "HostileProcessor"}),
    ],
)
@pytest.mark.parametrize("door", ["transformers:{}", "transformers:org/any"])
def test_a_transformers_folder_with_code_is_refused(tmp_path, monkeypatch, file, classes, door):
    folder = models.clip_folder(tmp_path / "m")
    plant(folder, file=file, classes=classes)
    monkeypatch.setattr(gkl_vl.models.clip, "fetch", lambda *_, **__: folder)
    refused(door.format(folder), f"{file} asks for Python code of its own")


@pytest.mark.parametrize("key", ["attn_implementation", "quantization_config"])
def test_a_config_that_would_fetch_kernels_or_quantisers_is_refused(tmp_path, key):
    folder = models.clip_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: "org/kernel"}))
    refused(f"transformers:{folder}", f"{key} in .*config.json is not supported: remove it")


def test_an_adapter_is_refused(tmp_path):
    folder = models.clip_folder(tmp_path / "m")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/other"}))
    refused(f"transformers:{folder}", "adapter_config.json is an adapter of another model: merge it")


def test_pickled_weights_beside_safetensors_of_another_name_are_a_pickle(tmp_path):
    """transformers reads pytorch_model.bin here, whatever other safetensors the folder holds."""
    folder = models.clip_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "open_clip_model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle"):
        load_clip(f"transformers:{folder}")


# ---- classifiers


def test_a_classifiers_folder_runs_no_code(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    config = {"architecture": "test_resnet", "num_classes": 3, "model_args": {"hub": "hostile"}}
    (folder / "config.json").write_text(json.dumps(config))
    plant(folder, file="config.json", classes={"AutoModelForImageClassification": "HostileModel"})
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        load_classifier(f"local-dir:{folder}")
    assert "\n" not in str(caught.value)


# ---- the sources

LOADER = "gkl_vl/models/pretrained.py"


def unsafe_calls(path: str, source: str) -> list[str]:
    """Calls that could run code of a file: loaders outside `pretrained.py`, and loaders without their safe switch."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        switches = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        trusts = switches.get("trust_remote_code", "False") != "False"
        foreign = name.endswith(".from_pretrained") and not (path == LOADER and "trust_remote_code" in switches)
        foreign |= name.endswith("HFTokenizer") and not (path == LOADER and "trust_remote_code" in switches)
        foreign |= name in ("open_clip.create_model", "open_clip.get_tokenizer", "torch.hub.load")
        foreign |= name.startswith("open_clip.create_model_")
        unsafe_pickle = name == "torch.load" and switches.get("weights_only") != "True"
        unsafe_pickle |= switches.get("allow_pickle") == "True" and name.startswith(("np.", "numpy."))
        unsafe_pickle |= name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load")
        if trusts or foreign or unsafe_pickle:
            found.append(f"{name} in line {node.lineno}")
    return found


def test_the_sources_load_nothing_past_the_checks():
    house = SOURCES[0].parents[1]
    shipped = [p for p in SOURCES if p.relative_to(house).parts[0] in ("gkl_vl", "recipes", "eval", "benchmarks")]
    found = {p.name: unsafe_calls(p.relative_to(house).as_posix(), p.read_text()) for p in shipped}
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "source",
    [
        "AutoModel.from_pretrained(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)",
        "pickle.loads(x)",
        "open_clip.create_model_and_transforms(x)",
        "datasets.load_dataset(x, trust_remote_code=True)",
    ],
)
def test_a_call_past_the_checks_is_noticed(source):
    assert unsafe_calls("gkl_vl/data/files.py", source)
    assert not unsafe_calls(LOADER, "AutoModel.from_pretrained(x, trust_remote_code=False)")
