"""Where a student starts from and what of it is trained: inheritance, pretrained weights, locks, LoRA, fine-tuning."""

import json
import re
from pathlib import Path

import open_clip
import peft
import pytest
import test_recipes
import test_resume
import test_transformers_students
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import CONFIG
from small_sets import COLOURS, colour_set, picture, write_shard

from gkl_vl.export.hub import export_clip
from gkl_vl.models.clip import load_clip
from gkl_vl.models.depth import depth_groups
from gkl_vl.models.inherit import inherit
from gkl_vl.models.towers import OpenClipTowers
from gkl_vl.training.clip_mixing import mixed

call = test_recipes.call  # the fixture
pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = "open_clip_model.safetensors"
TEACHER = CONFIG | {"embed_dim": 12}
TEACHER["vision_cfg"] = CONFIG["vision_cfg"] | {"layers": 3, "width": 64}
TEACHER["text_cfg"] = CONFIG["text_cfg"] | {"layers": 2, "width": 64, "heads": 4, "context_length": 16}
SMALLER = CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"layers": 2}}
SHALLOW = TEACHER | {"vision_cfg": TEACHER["vision_cfg"] | {"layers": 2}}
COCA = CONFIG | {"embed_dim": 16, "multimodal_cfg": {"width": 32, "heads": 2, "layers": 1}}
COCA["vision_cfg"] = CONFIG["vision_cfg"] | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
COCA["text_cfg"] = CONFIG["text_cfg"] | {"embed_cls": True, "output_tokens": True}
CONV = CONFIG | {"vision_cfg": {"image_size": 32, "timm_model_name": "test_resnet", "timm_proj": "linear"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A teacher with weights, configs of students, coloured squares with captions, a set to evaluate on."""
    place = tmp_path_factory.mktemp("student_flags")
    configs = {"teacher": TEACHER, "smaller": SMALLER, "equal": TEACHER, "conv": CONV, "shallow": SHALLOW, "coca": COCA}
    for name, config in (configs | {"other_space": SMALLER | {"embed_dim": 8}}).items():
        (place / f"{name}.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    for name in ("teacher", "conv"):
        export_clip(clip=load_clip(str(place / f"{name}.json")), folder=place / name, card=test_recipes.CARD)
    colours = [list(COLOURS)[n % 3] for n in range(24)]
    pairs = [
        (f"{n}", {"png": picture(c, size=6 + n % 4), "txt": f"a {c} square".encode()}) for n, c in enumerate(colours)
    ]
    write_shard(place / "pairs.tar", pairs)
    for name in ("colours", "shades"):
        colour_set(place / name, ["red", "green", "blue", "red", "blue"])
    return place


def flags_of(place: Path, *flags: object, student: str = "local-dir:{place}/teacher") -> list[str]:
    own = [] if "--teacher" in flags else ["--teacher", f"local-dir:{place}/teacher"]
    own += ["--student", student.format(place=place), "--workers", "0"]
    own += ["--train-data", str(place / "pairs.tar"), "--batch-size", "8", "--steps", "6", "--warmup", "2"]
    return [*own, *map(str, flags)]


def trained(call, place: Path, *flags: object, recipe: str = "clip_kd", **student: str) -> str:
    """stdout of a run that succeeds."""
    code, printed, errors = call(*flags_of(place, *flags, **student), recipe=recipe)
    assert code == 0, errors
    return printed


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / WEIGHTS)


STILL = ["--lr", "0", "--wd", "0", "--steps", "1", "--warmup", "0"]
"""A run that changes nothing."""

# ---- initial weights ---------------------------------------------------------------------------------------------


def test_a_student_starts_from_its_teachers_parts(place, call):
    printed = trained(call, place, *STILL, "--init-from-teacher", "--inherit-layers", "0", "2", "--output-dir", "run",
                      student="{place}/smaller.json")  # fmt: skip
    expected, teacher = load_clip(str(place / "smaller.json")), load_clip(f"local-dir:{place}/teacher")
    lines = inherit(expected, teacher, layers=[0, 2])
    assert all(line in printed for line in lines)
    got = weights("run/model")
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.towers.model.state_dict().items())


def test_a_student_of_equal_shapes_starts_as_its_teacher(place, call):
    trained(call, place, *STILL, "--init-from-teacher", "--output-dir", "run", student="{place}/equal.json")
    test_resume.assert_bitwise(weights("run/model"), weights(place / "teacher"))


def test_a_student_starts_from_a_file_or_from_random_weights(place, call):
    file = ["--student-pretrained", place / "teacher" / WEIGHTS]
    trained(call, place, *STILL, *file, "--output-dir", "file", student="{place}/equal.json")
    test_resume.assert_bitwise(weights("file/model"), weights(place / "teacher"))
    trained(call, place, *STILL, "--student-init", "random", "--output-dir", "random")
    own = weights(place / "teacher")
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    assert not torch.equal(weights("random/model")[name], own[name])


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_a_student_of_transformers_is_trained_resumed_and_exported(place, call, kind):
    """From its weights and a part of it locked, then once more from the exported run, with adapters."""
    test_transformers_students.FOLDERS[kind](Path("folder"))
    flags = ["--lock-image", "--unlocked-groups", "1", "--checkpoint-every-steps", "3", "--output-dir", "run"]
    printed = trained(call, place, *flags, student="transformers:folder")
    assert f'model = {kind}.from_pretrained("run/model")' in printed
    want, start = load_file("run/model/model.safetensors"), load_file("folder/model.safetensors")
    moved = {name for name in want if not torch.equal(want[name], start[name])}
    groups = names_in(load_clip("transformers:folder").towers, "image")
    assert moved & set.union(*groups) <= groups[-1] and moved & groups[-1] and len(moved) > len(groups[-1])
    Path("run/checkpoints/step_00000006").rename("later")
    trained(call, place, *flags, "--resume", "latest", student="transformers:folder")
    test_resume.assert_bitwise(load_file("run/model/model.safetensors"), want)
    trained(call, place, "--lora-rank", "2", "--lr", "0.1", "--output-dir", "adapted", student="run")
    model, whole = getattr(transformers, kind).from_pretrained("adapted/model"), load_clip("adapted")
    assert model.state_dict().keys() == whole.towers.model.state_dict().keys()
    assert {path.name for path in Path("adapted/adapter").iterdir()} >= {"adapter_model.safetensors"}


def names_in(towers, side: str) -> list[set[str]]:
    name_of = {parameter: name for name, parameter in towers.model.named_parameters()}
    return [{name_of[parameter] for parameter in group} for group in depth_groups(towers, side)]


# ---- locks -------------------------------------------------------------------------------------------------------


def test_a_locked_tower_stays_and_its_run_resumes(place, call):
    """Under a moving average; checkpoints hold neither the frozen weights nor optimizer states of theirs."""
    flags = ["--lock-image", "--unlocked-groups", "1", "--ema-decay", "0.5", "--checkpoint-every-steps", "3"]
    printed = trained(call, place, *flags, "--output-dir", "whole")
    start, want = weights(place / "teacher"), test_resume.state(Path("whole"))
    moved = {name for name, tensor in want["exported"].items() if not torch.equal(tensor, start[name])}
    frozen = {name for name in start if name.startswith("visual.") and name != "visual.proj"}
    assert {"visual.proj", "logit_scale", "text_projection"} <= moved and not moved & frozen
    assert not {name for name in [*want["model"], *want["ema"]] for one in frozen if name.endswith(f"model.{one}")}
    assert len(want["optimizer"]) == len(start) - len(frozen) - ("attn_mask" in start)
    assert re.search(r"image tower +[\d,]+ +768 ", printed)
    trained(call, place, *flags, "--output-dir", "stopped")
    Path("stopped/checkpoints/step_00000006").rename("later")
    trained(call, place, *flags, "--output-dir", "stopped", "--resume", "latest")
    test_resume.assert_bitwise(test_resume.state(Path("stopped")), want)


def test_a_run_does_not_go_on_beside_other_frozen_weights(place, call):
    """Also one whose config.json is older than some flags, which have their defaults then."""
    student = Path("student")
    export_clip(clip=load_clip(f"local-dir:{place}/teacher"), folder=student, card=test_recipes.CARD)
    flags = ["--lock-text", "--checkpoint-every-steps", "3", "--output-dir", "run"]
    trained(call, place, *flags, student="local-dir:student")
    config = json.loads(Path("run/config.json").read_text())
    older = {name: value for name, value in config.items() if name not in ("lora_rank", "unlocked_groups")}
    Path("run/config.json").write_text(json.dumps(older))
    Path("run/checkpoints/step_00000006").rename("later")
    trained(call, place, *flags, "--resume", "latest", student="local-dir:student")
    changed = weights(student)
    changed["positional_embedding"] = changed["positional_embedding"] + 1e-6
    save_file(changed, student / WEIGHTS)
    flags = flags_of(place, *flags, "--resume", "latest", student="local-dir:student")
    code, _, errors = call(*flags)
    assert code == 2 and errors.count("\n") == 1, errors
    assert re.search("checkpoint 'run/.*00000006' was trained beside other frozen weights than those", errors)


# ---- LoRA --------------------------------------------------------------------------------------------------------


def test_adapters_alone_are_saved_and_the_export_is_a_plain_model(place, call):
    flags = ["--lora-rank", "2", "--lora-targets", "visual.transformer.resblocks.1.mlp.c_fc", "attn", "--lr", "0.1"]
    flags += ["--checkpoint-every-steps", "3", "--ema-decay", "0.5"]
    printed = trained(call, place, *flags, "--output-dir", "whole")
    assert re.search(r"logit scale and bias +1 +0 ", printed)
    want, start = test_resume.state(Path("whole")), weights(place / "teacher")
    # the only other tensors are the count of the average and the maps, of which there are none here
    assert {"lora_" in name for name in want["model"]} == {True}
    assert {name for name in want["ema"] if "lora_" not in name} == {"n_averaged"}
    got = want["exported"]
    assert got.keys() == start.keys()
    moved = {name for name, tensor in got.items() if not torch.equal(tensor, start[name])}
    attention = {name for name in start if name.endswith("attn.in_proj_weight")}
    assert moved == attention | {"visual.transformer.resblocks.1.mlp.c_fc.weight"}
    change = (
        got["visual.transformer.resblocks.1.mlp.c_fc.weight"] - start["visual.transformer.resblocks.1.mlp.c_fc.weight"]
    )
    assert torch.linalg.matrix_rank(change, atol=1e-5) == 2
    model, _, _ = open_clip.create_model_and_transforms("local-dir:whole/model")
    assert model.state_dict().keys() == got.keys() | {"attn_mask"} - ({"attn_mask"} - got.keys())
    assert {path.name for path in Path("whole/adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    trained(call, place, *flags, "--output-dir", "stopped")
    Path("stopped/checkpoints/step_00000006").rename("later")
    trained(call, place, *flags, "--output-dir", "stopped", "--resume", "latest")
    test_resume.assert_bitwise(test_resume.state(Path("stopped")), want)


# ---- fine-tuning -------------------------------------------------------------------------------------------------


def test_fine_tuning_exports_the_average_with_the_start(place, call):
    flags = ["--eval-data", "colours", "--old-data", "shades", "--dataset-root", place / "{dataset}", "--steps", "3"]
    flags += ["--layer-decay", "0.5", "--lr", "1e-3"]
    for share in ("1", "0.25"):
        printed = trained(call, place, *flags, "--interpolate", share, "--output-dir", share, recipe="clip_finetune")
    start, end, average = weights(place / "teacher"), weights("1/model"), weights("0.25/model")
    assert not torch.equal(start["visual.proj"], end["visual.proj"])
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, 0.75 * start[name] + 0.25 * end[name], rtol=1e-6, atol=1e-8)
    records = [json.loads(line) for line in Path("0.25/results.jsonl").read_text().splitlines()]
    roles = [record["model"] for record in records if record.get("dataset") == "shades"]
    assert [role for role in roles if "mixed" in role] == [
        f"mixed {share}" for share in ("0", "0.25", "0.5", "0.75", "1")
    ]
    by_role = {record["model"]: record["acc1"] for record in records if record.get("dataset") == "colours"}
    assert by_role["mixed 0"] == by_role["teacher"] and by_role["mixed 1"] == by_role["student"]
    assert Path("0.25/interpolation.png").stat().st_size > 10_000 and "interpolation.png" in printed
    card = Path("0.25/model/README.md").read_text()
    assert f"{100 * by_role['mixed 0.25']:.1f}" in card


def test_adapters_of_an_average_are_a_share_of_the_trained(place, call):
    """The start and the saved adapters give the exported model."""
    flags = ["--lora-rank", "2", "--lr", "0.1", "--interpolate", "0.25", "--steps", "3", "--output-dir", "run"]
    trained(call, place, *flags, recipe="clip_finetune")
    start, exported = load_clip(f"local-dir:{place}/teacher"), load_clip("run")
    adapted = peft.PeftModel.from_pretrained(start.towers.model, "run/adapter")
    pixels, tokens = torch.rand(3, 3, 16, 16), exported.tokenize(["a red square", "b", "c d"])
    with torch.no_grad():
        image, text = adapted.encode_image(pixels), adapted.encode_text(tokens)
        torch.testing.assert_close(image, exported.towers.eval().model.encode_image(pixels), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(text, exported.towers.model.encode_text(tokens), rtol=1e-5, atol=1e-5)
    assert not torch.equal(weights("run/model")["transformer.resblocks.0.mlp.c_fc.weight"],
                           weights(place / "teacher")["transformer.resblocks.0.mlp.c_fc.weight"])  # fmt: skip
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"local-dir:{place}/teacher"


def test_a_run_does_not_average_with_another_start(place, call):
    student = Path("student")
    export_clip(clip=load_clip(f"local-dir:{place}/teacher"), folder=student, card=test_recipes.CARD)
    flags = ["--checkpoint-every-steps", "3", "--output-dir", "run"]
    trained(call, place, *flags, student="local-dir:student", recipe="clip_finetune")
    Path("run/checkpoints/step_00000006").rename("later")
    changed = weights(student)
    changed["visual.proj"] = changed["visual.proj"] + 1e-6
    save_file(changed, student / WEIGHTS)
    flags = flags_of(place, *flags, "--resume", "latest", student="local-dir:student")
    code, _, errors = call(*flags, recipe="clip_finetune")
    assert code == 2 and "--student has other weights than at its start: restore them" in errors, errors


def test_a_pretrained_scale_above_100_stays(place, call):
    """As SigLIP's are; CLIP's bound is for scales that grow."""
    loud = load_clip(f"local-dir:{place}/teacher")
    with torch.no_grad():
        loud.towers.model.logit_scale.fill_(4.8)
    export_clip(clip=loud, folder=Path("loud"), card=test_recipes.CARD)
    trained(call, place, *STILL, "--output-dir", "run", student="local-dir:loud")
    assert weights("run/model")["logit_scale"].item() == pytest.approx(4.8)


def test_the_average_keeps_infinities_and_integers():
    class Model(torch.nn.Module):
        def __init__(self, weight: float, count: int):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([weight, 2.0]))
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
            self.register_buffer("count", torch.tensor(count))

    start, end = Model(1.0, 3), Model(5.0, 9)
    result = mixed(OpenClipTowers(start), OpenClipTowers(end), 0.25).model.state_dict()
    assert result["weight"].tolist() == [2.0, 2.0] and result["mask"].tolist() == [0.0, -torch.inf]
    assert result["count"] == 9 and end.weight.tolist() == [5.0, 2.0] and start.weight.tolist() == [1.0, 2.0]


# ---- memory and speed --------------------------------------------------------------------------------------------


COMPILED_AS_IT_IS = """
import runpy, sys, torch
compiled = torch.compile
def compile_as_it_is(model, *, backend, **settings):
    print("compiles with", backend)
    return compiled(model, backend="eager", **settings)
torch.compile = compile_as_it_is
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def losses(folder: str) -> list[float]:
    records = [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def test_memory_flags_do_not_change_the_loss(place, call, tmp_path):
    """Beside a locked tower. Compilation is by a backend that runs a graph as it is, in a process without type checks.

    The compiled model has its checkpoint under the names of the plain one.
    """
    locked = ["--lock-image", "--unlocked-groups", "2"]
    trained(call, place, *locked, "--output-dir", "plain")
    trained(call, place, *locked, "--grad-checkpointing", "--output-dir", "again")
    assert losses("again") == pytest.approx(losses("plain"), rel=1e-5)
    trained(call, place, *locked, "--patch-dropout", "0.5", "--output-dir", "dropped")
    assert losses("dropped") != pytest.approx(losses("plain"), rel=1e-3)
    flags = flags_of(place, *locked, "--torchcompile", "--output-dir", "compiled")
    done = test_recipes.python("-c", COMPILED_AS_IT_IS, test_recipes.RECIPE, *flags, cwd=tmp_path)
    assert done.returncode == 0 and "compiles with inductor" in done.stdout, done.stderr
    assert losses("compiled") == pytest.approx(losses("plain"), rel=1e-5)
    assert weights("compiled/model").keys() == weights("plain/model").keys()
    checkpoints = [load_file(f"{run}/checkpoints/step_00000006/model.safetensors") for run in ("compiled", "plain")]
    assert checkpoints[0].keys() == checkpoints[1].keys()


# ---- refusals ----------------------------------------------------------------------------------------------------

OF_TEACHER = "local-dir:{place}/teacher"


@pytest.mark.parametrize(
    "recipe, student, flags, message",
    [
        ("clip_kd", OF_TEACHER, ["--lora-alpha", "2"], "--lora-alpha 2.0 has no effect without --lora-rank"),
        ("clip_kd", OF_TEACHER, ["--lora-rank", "2", "--lock-text"], "--lock-text has no effect with --lora-rank"),
        ("clip_kd", OF_TEACHER, ["--unlocked-groups", "2"], "--unlocked-groups 2 has no effect without --lock-image"),
        ("clip_kd", OF_TEACHER, ["--freeze-norm-stats"], "--freeze-norm-stats has no effect without --lock-image"),
        ("clip_kd", OF_TEACHER, ["--lock-image", "--lock-text"], "--lock-image and --lock-text leave nothing to train"),
        ("clip_kd", OF_TEACHER, ["--lora-rank", "2", "--lora-targets", "qqq"], "such as"),
        ("clip_kd", "{place}/equal.json", ["--lock-image"], "--lock-image keeps weights of --student .* are random"),
        ("clip_kd", "{place}/equal.json", ["--lora-rank", "2"], "--lora-rank keeps weights of --student .* are random"),
        (
            "clip_kd",
            OF_TEACHER,
            ["--inherit-layers", "0"],
            "--inherit-layers 0 has no effect without --init-from-teacher",
        ),
        ("clip_kd", OF_TEACHER, ["--init-from-teacher"], "comes with weights, which --init-from-teacher would replace"),
        (
            "clip_kd",
            "{place}/smaller.json",
            ["--init-from-teacher", "--lock-image"],
            "--lock-image would freeze a tower that --init-from-teacher cuts out of a larger one",
        ),
        (
            "clip_kd",
            "{place}/smaller.json",
            ["--init-from-teacher", "--teacher", "local-dir:{place}/conv"],
            "the image tower of .* is timm's test_resnet: inheritance needs open_clip's ViT towers",
        ),
        (
            "clip_kd",
            "{place}/equal.json",
            ["--init-from-teacher", "--teacher", "none"],
            "needs a teacher to take weights",
        ),
        ("clip_kd", OF_TEACHER, ["--student-pretrained", "openai"], "pretrained 'openai' does not go with"),
        ("clip_image_tower", OF_TEACHER, ["--lock-text"], "--lock-text has no effect, for this tower is the teacher's"),
        ("clip_image_tower", OF_TEACHER, ["--lock-image"], "--lock-image leaves nothing to train"),
        ("clip_image_tower", OF_TEACHER, ["--text-only", "--patch-dropout", "0.5"], "--patch-dropout 0.5 is of images"),
        ("clip_image_tower", "{place}/other_space.json", ["--init-from-teacher"], "take a student of this embed_dim"),
        (
            "clip_kd",
            "{place}/shallow.json",
            ["--init-from-teacher", "--lock-image"],
            "--lock-image would freeze a tower",
        ),
        (
            "clip_kd",
            "{place}/smaller.json",
            ["--init-from-teacher", "--lora-rank", "2"],
            "--lora-rank would freeze a tower",
        ),
        ("clip_kd", OF_TEACHER, ["--student-init", "random", "--lock-text"], "random: leave out --student-init random"),
        ("clip_kd", "{place}/coca.json", ["--teacher", "none"], "is a CoCa, whose captioner no loss here trains"),
        ("clip_finetune", "{place}/equal.json", [], "has random weights, and fine-tuning starts from trained ones"),
        ("clip_finetune", OF_TEACHER, ["--interpolate", "1.5"], "--interpolate 1.5 must be at least 0 and at most 1"),
        (
            "clip_finetune",
            OF_TEACHER,
            ["--eval-data", "emoji", "--old-data", "emoji"],
            "emoji is in --eval-data and in",
        ),
    ],
)
def test_flags_that_contradict_each_other_are_refused(place, call, recipe, student, flags, message):
    given = [flag.format(place=place) for flag in flags]
    code, _, errors = call(*flags_of(place, *given, student=student), recipe=recipe)
    assert code == 2 and re.search(message, errors) and errors.count("\n") == 1, errors
    assert not Path("runs").exists()
