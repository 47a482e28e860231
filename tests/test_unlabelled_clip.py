"""Distillation of zero-shot logits from images only: the loss and its gradient, one template and one prior per update,
equal results from several processes, micro-batches and resumed runs, and the recipe."""

import copy
import io
import json
import tarfile
from pathlib import Path

import datasets
import pytest
import test_recipes
import test_resume
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import run_ranks
from small_models import CONFIG
from small_sets import COLOURS, colour_set, picture, write_picture
from torch.testing import assert_close

from gkl_vl.data import pairs
from gkl_vl.data.augment import light_augmentation
from gkl_vl.data.pair_stream import PairLoader, PairStream
from gkl_vl.data.pairs import open_images
from gkl_vl.data.prompts import Prompts
from gkl_vl.errors import UserError
from gkl_vl.evaluation.embed import Embedder, zero_shot_classifier
from gkl_vl.losses.gkl import GklSettings
from gkl_vl.losses.image_text import class_logits
from gkl_vl.models.clip import Clip, load_clip
from gkl_vl.models.modes import freeze
from gkl_vl.models.student import Student
from gkl_vl.objectives.common import EpochPrior
from gkl_vl.objectives.zero_shot import ZeroShotKd, prompt_tokens
from gkl_vl.teachers.online import online_teacher
from gkl_vl.training import clip as training
from gkl_vl.training import clip_teacher
from gkl_vl.training.gradient_cache import backward_from_cache, embed_all

call = test_recipes.call  # the fixture
pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("a very long name of a thing", "cat", "a dog that barks", "fish", "the smallest bird")
PROMPTS = Prompts(classnames=NAMES, templates=("{c}", "a photo of {c}, they say", "{c}!"))
WEIGHTS = GklSettings(soft_ce_weight=2.0, wmse_weight=0.3, gamma=0.7, temperature=2.0, weight_temperature=3.0)
CROSS = GklSettings(soft_ce_weight=1.5, wmse_weight=0.4, gamma=0.7, temperature=2.0, weight_temperature=3.0)
NO_CROSS = GklSettings(soft_ce_weight=0.0, wmse_weight=0.0)
ROWS = 12
UPDATES = 5  # of ROWS images each; a pass over the data is 2 of them
PASS = 2 * ROWS
TINY = CONFIG | {"text_cfg": test_resume.MODEL["text_cfg"] | {"context_length": 24}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two model configurations."""
    folder = tmp_path_factory.mktemp("zero_shot")
    (folder / "zero_shot_student.json").write_text(json.dumps(TINY))
    wider = TINY | {"embed_dim": 20, "vision_cfg": TINY["vision_cfg"] | {"image_size": 24}}
    (folder / "zero_shot_teacher.json").write_text(json.dumps(wider))
    return folder


def models(folder: Path, *, bias: bool = False) -> tuple[Clip, Clip]:
    """Student and frozen teacher, equal in every process."""
    clips = []
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        clips.append(load_clip(str(folder / f"zero_shot_{name}.json")))
        if bias:
            clips[-1].towers.model.logit_bias = torch.nn.Parameter(torch.tensor(-2.0 - seed))
    return clips[0], freeze(clips[1])


def class_embeddings(teacher: Clip) -> torch.Tensor:
    embedder = Embedder(clip=teacher, alone=True)
    return zero_shot_classifier(embedder, classnames=PROMPTS.classnames, templates=PROMPTS.templates)


def zero_shot_kd(student: Clip, teacher: Clip, *, with_prior=True, gkl=WEIGHTS, cross=NO_CROSS, seed=0) -> ZeroShotKd:
    return ZeroShotKd(
        student=student,
        teacher=online_teacher(teacher),
        classes=[class_embeddings(teacher)],
        tokens=prompt_tokens(PROMPTS, student, torch.device("cpu")),
        gkl=gkl,
        cross=cross,
        prior=EpochPrior(len(NAMES), gkl.weight_temperature) if with_prior else None,
        num_images=PASS if with_prior else None,
        seed=seed,
    )


def batches() -> list[dict]:
    draw = torch.Generator().manual_seed(1)
    colours = torch.randint(0, 256, (UPDATES * ROWS, 3, 1, 1), generator=draw)
    noise = torch.randint(-40, 40, (UPDATES * ROWS, 3, 24, 24), generator=draw)
    images = (colours + noise).clamp(0, 255).byte().split(ROWS)
    return [{"image": image, "keys": [f"{i}/{k}" for k in range(ROWS)]} for i, image in enumerate(images)]


def colour_teacher(batch: dict) -> dict[str, torch.Tensor]:
    """Embeddings from the mean colour, one dimension a class: a random CLIP predicts the same class for all images."""
    by_class = torch.randn(3, len(NAMES), generator=torch.Generator().manual_seed(4))
    image = (batch["image"].float().mean(dim=(2, 3)) / 128 - 1) @ by_class
    return {"teacher_image": F.normalize(image, dim=1), "teacher_logit_scale": torch.tensor(8.0)}


def part(batch: dict, start: int, stop: int) -> dict:
    return {name: value[start:stop] for name, value in batch.items()}


def model_of(student: Clip, teacher_dim: int | None = None) -> Student:
    """With `teacher_dim` its images have a map into the teacher's space."""
    torch.manual_seed(5)
    sides = () if teacher_dim is None else ("image",)
    return Student(
        student.towers,
        embed_dim=student.embed_dim,
        teacher_dims=[] if teacher_dim is None else [teacher_dim],
        mapped=sides,
    )


# ---- the loss ----------------------------------------------------------------------------------------------------


def naive_loss(student, teacher, prior, weights) -> torch.Tensor:
    """The paper's formula, in loops over rows and pairs of classes."""
    soft_ce, above, below = 0.0, 0.0, 0.0
    for s, t, p in zip(student, teacher, prior, strict=True):
        target = torch.softmax(t / weights.temperature, 0)
        soft_ce = soft_ce - (target * torch.log_softmax(s / weights.temperature, 0)).sum() / len(student)
        w = (torch.softmax(t / weights.weight_temperature, 0) if p is None else p) ** weights.gamma
        differences = (t[:, None] - t[None, :]) - (s[:, None] - s[None, :])
        above = above + 0.25 * (w[:, None] * w[None, :] * differences**2).sum()
        below = below + w.sum() ** 2
    return weights.soft_ce_weight * soft_ce + weights.wmse_weight * above / below


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows, classes", [(1, 2), (3, 7), (7, 3)])
@pytest.mark.parametrize("with_prior", [False, True])
def test_the_loss_and_its_gradient_equal_the_papers(folder, dtype, rows, classes, with_prior):
    draw = torch.Generator().manual_seed(rows)
    student, teacher = (3 * torch.randn(rows, classes, generator=draw, dtype=dtype) for _ in range(2))
    prior = torch.softmax(2 * torch.randn(rows, classes, generator=draw, dtype=dtype), 1) if with_prior else None
    objective = zero_shot_kd(*models(folder))
    leaf, naive_leaf = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss, scalars = objective.loss(
        {"logits": leaf}, {"teacher_logits": teacher} | ({"prior": prior} if with_prior else {})
    )
    expected = naive_loss(naive_leaf, teacher, [None] * rows if prior is None else prior, WEIGHTS)
    loss.backward()
    expected.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert_close(loss, expected, rtol=tolerance, atol=0)
    assert_close(leaf.grad, naive_leaf.grad, rtol=tolerance, atol=tolerance)
    halves = 2 * scalars["soft_ce"] + 0.3 * scalars["wmse"]
    assert_close(halves, loss.detach().float(), rtol=1e-5, atol=0)
    assert scalars["agreement@1"] == (student.argmax(1) == teacher.argmax(1)).float().mean()


@pytest.mark.parametrize("bias", [False, True])
def test_logits_equal_those_of_a_zero_shot_classifier(folder, bias):
    """The student's with the untrimmed prompts of this update; the teacher's with the mean of all prompts."""
    student, teacher = models(folder, bias=bias)
    objective, batch, model = zero_shot_kd(student, teacher), batches()[0], model_of(student).eval()
    with torch.no_grad():
        got, teacher_logits = objective.outputs(model, batch)["logits"], objective.targets(batch)["teacher_logits"]
        tokens = student.tokenize(PROMPTS.of_template(objective.template()))
        classes = student.towers.model.encode_text(tokens, normalize=True)
        image = student.towers.model.encode_image(student.prepare(batch["image"]), normalize=True)
        want = student.towers.model.logit_scale.exp() * image @ classes.T
        assert_close(got, want - (2 if bias else 0), rtol=1e-4, atol=1e-4)
        prompts = [[template.replace("{c}", name) for template in PROMPTS.templates] for name in NAMES]
        encoded = [teacher.towers.model.encode_text(teacher.tokenize(texts), normalize=True) for texts in prompts]
        classes = torch.stack([F.normalize(texts.mean(0), dim=0) for texts in encoded])
        image = teacher.towers.model.encode_image(teacher.prepare(batch["image"]), normalize=True)
        want = teacher.towers.model.logit_scale.exp() * image @ classes.T
        assert_close(teacher_logits, want - (3 if bias else 0), rtol=1e-4, atol=1e-4)


def test_logits_are_fp32_within_autocast():
    draw = torch.Generator().manual_seed(0)
    image, classes = (F.normalize(torch.randn(n, 8, generator=draw), dim=1) for n in (3, 5))
    scale = torch.tensor(30.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = class_logits(image=image, classes=classes, logit_scale=scale)
        halves = class_logits(image=image.bfloat16(), classes=classes.bfloat16(), logit_scale=scale)
    assert torch.equal(logits, scale * image @ classes.T) and halves.dtype == torch.float32


def test_both_towers_of_the_student_have_a_gradient_and_the_teacher_none(folder):
    student, teacher = models(folder)
    before = copy.deepcopy(teacher.towers.state_dict())
    objective, model, batch = zero_shot_kd(student, teacher), model_of(student), batches()[0]
    targets = objective.targets(batch)
    assert not any(target.requires_grad for target in targets.values())
    loss, _ = objective.loss(objective.outputs(model, batch), targets)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # for DDP
    for prefix in ("visual.", "transformer.", "token_embedding", "logit_scale"):
        gradients = [p.grad for name, p in student.towers.model.named_parameters() if name.startswith(prefix)]
        assert gradients and max(gradient.abs().max() for gradient in gradients) > 0
    assert all(parameter.grad is None for parameter in teacher.towers.parameters())
    after = teacher.towers.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_an_update_has_one_template_drawn_from_seed_and_number(folder):
    def drawn(objective, updates=20):
        templates = []
        for _ in range(updates):
            with objective.around_update([{"keys": ["a"]}, {"keys": ["b"]}]):
                templates.append([objective.template() for _ in range(2)])
        assert all(first == second for first, second in templates)
        return [first for first, _ in templates]

    pair = models(folder)
    first = drawn(zero_shot_kd(*pair))
    assert set(first) == {0, 1, 2} and first == drawn(zero_shot_kd(*pair))
    assert first != drawn(zero_shot_kd(*pair, seed=1))


# ---- the class prior ---------------------------------------------------------------------------------------------


def updates_of(objective: ZeroShotKd, model: torch.nn.Module, shares: list[list[dict]]) -> list[dict]:
    """Loss, gradient, rows of the prior and template of each update; `shares` has the batches of each."""
    accelerator, results = Accelerator(cpu=True), []
    for parts in shares:
        model.zero_grad()
        with objective.around_update(parts):
            template = objective.template()
            cached = embed_all(accelerator, model, objective, parts)
            loss, _ = objective.loss(cached.outputs, cached.targets)
            loss.backward()
            backward_from_cache(accelerator, model, objective, parts, cached)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append(
            {
                "loss": loss.detach(),
                "gradient": gradient,
                "prior": cached.targets["prior"],
                "teacher_logits": cached.targets["teacher_logits"],
                "template": template,
            }
        )
    return results


def with_colour_teacher(folder: Path) -> ZeroShotKd:
    objective = zero_shot_kd(*models(folder), cross=CROSS)
    objective.teacher, objective.classes = colour_teacher, [torch.eye(len(NAMES))]
    return objective


def run_of(rank: int, world_size: int, folder: Path, accum_steps: int = 1) -> list[dict]:
    """Every update with this rank's rows of the batches, in `accum_steps` parts."""
    rows, parts = ROWS // world_size, []
    for batch in batches():
        own = part(batch, rank * rows, (rank + 1) * rows)
        step = rows // accum_steps
        parts.append([part(own, start, start + step) for start in range(0, rows, step)])
    objective = with_colour_teacher(folder)
    return updates_of(objective, model_of(objective.student, len(NAMES)), parts)


@pytest.fixture(scope="module")
def alone(folder) -> list[dict]:
    return run_of(0, 1, folder)


def test_the_prior_is_the_teachers_mean_softmax_in_the_pass_before(alone):
    for number, update in enumerate(alone):
        of_pass = number // 2
        expected = torch.full((len(NAMES), len(NAMES)), 1 / len(NAMES))
        if of_pass:
            before = torch.cat([alone[i]["teacher_logits"] for i in (2 * of_pass - 2, 2 * of_pass - 1)])
            for best in before.argmax(1).unique():
                rows = torch.softmax(before[before.argmax(1) == best].double() / WEIGHTS.weight_temperature, 1)
                expected[best] = rows.mean(0).float()
        assert_close(update["prior"], expected[update["teacher_logits"].argmax(1)], rtol=1e-5, atol=1e-7)
    assert len(torch.cat([update["teacher_logits"] for update in alone]).argmax(1).unique()) > 1
    assert (alone[2]["prior"] - alone[1]["prior"]).abs().max() > 0.01  # a new pass has a new prior
    assert (alone[4]["prior"] - alone[2]["prior"]).abs().max() > 1e-4


def same_updates(got: list[dict], want: list[dict]) -> None:
    for update, expected in zip(got, want, strict=True):
        assert update["template"] == expected["template"]
        assert_close(update["loss"], expected["loss"], rtol=1e-5, atol=0)
        assert (update["gradient"] - expected["gradient"]).abs().max() < 1e-5 * expected["gradient"].abs().max()


def test_several_processes_equal_one_on_the_joined_batch(folder, alone):
    first, second = run_ranks(run_of, 2, folder)
    for one, other, whole in zip(first, second, alone, strict=True):
        assert torch.equal(one["loss"], other["loss"]) and not torch.allclose(one["gradient"], other["gradient"])
        assert_close(torch.cat([one["prior"], other["prior"]]), whole["prior"], rtol=1e-5, atol=1e-7)
        one["gradient"] = (one["gradient"] + other["gradient"]) / 2  # as DistributedDataParallel does
    same_updates(first, alone)


@pytest.mark.parametrize("accum_steps", [2, 3])
def test_several_batches_equal_one_large_one(folder, alone, accum_steps):
    same_updates(run_of(0, 1, folder, accum_steps), alone)


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_a_loaded_state_continues_exactly(folder, cut):
    """Within a pass and between two passes."""
    whole, resumed = (with_colour_teacher(folder) for _ in range(2))
    model = model_of(whole.student, len(NAMES))
    parts = [[batch] for batch in batches()]
    updates_of(whole, model, parts[:cut])
    resumed.load_state(copy.deepcopy(whole.state()))
    expected = updates_of(whole, model, parts[cut:])
    for got, want in zip(updates_of(resumed, model, parts[cut:]), expected, strict=True):
        assert all(torch.equal(torch.as_tensor(got[name]), torch.as_tensor(want[name])) for name in want)
    assert resumed.state().keys() == whole.state().keys() == {"updates", "images", "prior", "sums", "epoch"}
    assert all(torch.equal(resumed.state()[name], tensor) for name, tensor in whole.state().items())


def test_without_a_prior_there_are_no_rows_and_no_state_of_it(folder):
    objective = zero_shot_kd(*models(folder), with_prior=False)
    assert "prior" not in objective.targets(batches()[0]) and set(objective.state()) == {"updates", "images"}


# ---- images ------------------------------------------------------------------------------------------------------


def write_tar(path: Path, samples: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, body in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))


def keys_of(source) -> list[str]:
    """Keys of the images in an epoch, from the stream used in training."""
    stream = PairStream(
        source,
        augment=light_augmentation(8),
        tokenizers={},
        batch_size=1,
        seed=0,
        rank=0,
        world_size=1,
        num_workers=0,
    )
    loader, keys = PairLoader(stream), []
    for batch in loader:
        if loader.position()["places"][0][0]:  # the next epoch
            return sorted(keys)
        assert set(batch) == {"image", "keys"}
        keys += batch["keys"]
    return keys


def test_images_need_no_captions(tmp_path):
    red, broken = picture("red"), b"no image"
    write_tar(
        tmp_path / "a.tar", {"0.png": red, "0.cls": b"3", "1.png": red, "2.png": broken, "3.png": red, "3.txt": b"a"}
    )
    assert keys_of(open_images(str(tmp_path / "a.tar"))) == ["0", "1", "3"]
    for path in ("0.png", "deep/er/1.JPG", "deep/2.png"):
        write_picture(tmp_path / "images" / path, "red")
    (tmp_path / "images" / "deep" / "notes.txt").write_text("no image")
    assert keys_of(open_images(str(tmp_path / "images"))) == ["0.png", "deep/2.png", "deep/er/1.JPG"]
    (tmp_path / "list.csv").write_text("filepath\nimages/0.png\nimages/deep/2.png\n")
    assert keys_of(open_images(str(tmp_path / "list.csv"))) == ["images/0.png", "images/deep/2.png"]
    table = datasets.Dataset.from_dict(
        {"pic": [{"bytes": red, "path": None}] * 2, "image": [red, red], "text": ["a", "b"]}
    )
    table.to_parquet(tmp_path / "t.parquet")
    name = str(tmp_path / "t.parquet")
    assert keys_of(open_images(name)) == keys_of(open_images(name, column="pic")) == ["t.parquet:0", "t.parquet:1"]


def test_missing_images_are_a_one_line_error(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("t.parquet", "has no column 'image', only text: name them with --columns"),
        ("empty", r"holds no shard, no parquet file and no image \(webp, .*, gif\), it has nothing"),
        ("none.tar", "does not exist"),
        ("none.csv", "does not exist"),
        ("none.parquet", "the table .*none.parquet. does not exist"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            open_images(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--train-data 'org/none' is no file here and could not be had from the Hub"):
        open_images("org/none")


# ---- the recipe --------------------------------------------------------------------------------------------------


RECIPE = "clip_unlabelled"


@pytest.fixture(scope="module")
def place(tmp_path_factory, folder) -> Path:
    """A teacher with weights, coloured squares in folders of classes and elsewhere, prompts."""
    place = tmp_path_factory.mktemp("recipe")
    _, teacher = models(folder)
    test_recipes.export_clip(clip=teacher, folder=place / "teacher", card=test_recipes.CARD)
    for number in range(24):
        colour = list(COLOURS)[number % 3]
        write_picture(place / "images" / colour / f"{number}.png", colour, size=6 + number % 4)
    (place / "images" / "red" / "broken.png").write_bytes(b"no image")
    write_tar(place / "shard.tar", {f"{n}.png": picture("red") for n in range(8)})
    prompts = {"classnames": ["blue", "red"], "templates": ["{c}", "a {c} square", "it is {c}."]}
    (place / "colours.json").write_text(json.dumps(prompts))
    (place / "colours.txt").write_text("{c}\na {c} square\n")
    (place / "no_place.json").write_text(json.dumps(prompts | {"templates": ["a square"]}))
    (place / "strange.json").write_text(json.dumps(prompts | {"classnames": ["red", "bleu"]}))
    (place / "student.json").write_text(json.dumps(test_resume.MODEL))  # with dropout of patches
    return place


def flags_of(place: Path, *flags: object) -> list[object]:
    own = ["--teacher", f"local-dir:{place}/teacher", "--student", place / "student.json", "--workers", "0"]
    return [*own, "--batch-size", "4", *flags]


def test_a_folder_of_images_makes_a_student(place, call):
    flags = flags_of(place, "--train-data", place / "images", "--prompts", place / "colours.txt", "--epochs", "2")
    code, told, errors = call(*flags, "--class-prior", "--output-dir", "run", recipe=RECIPE)
    assert code == 0, errors
    assert f"on images of {place}/images" in told and "12 steps of 4" in told
    records = [json.loads(line) for line in Path("run/results.jsonl").read_text().splitlines()]
    terms = {"loss", "soft_ce", "wmse", "agreement@1", "grad_norm", "lr", "skipped"}
    assert {f"train/{name}" for name in terms} <= set(records[-1]) and records[-1]["train/skipped"] >= 1
    assert f"- Training data: `{place}/images`\n" in Path("run/model/README.md").read_text()
    load_clip("run")


def test_the_bundled_drawings_are_embedded_once_and_their_captions_left_alone(place, tmp_path, monkeypatch):
    """32 of them, three classes, another evaluation set."""
    monkeypatch.chdir(tmp_path)
    recipe = test_recipes.module(test_recipes.HOUSE / "recipes" / f"{RECIPE}.py")
    few = pairs.bundled_pairs()[:32]
    monkeypatch.setattr(clip_teacher, "bundled_pairs", lambda: few)
    monkeypatch.setattr(pairs, "bundled_pairs", lambda: few)
    monkeypatch.setattr(clip_teacher, "online_teacher", None)  # not needed
    Path("three.json").write_text(json.dumps({"classnames": ["pizza", "dog", "tiger"], "templates": ["{c}", "a {c}"]}))
    colour_set(tmp_path / "colours", list(COLOURS))
    recipe.main(
        recipe.Config(
            model=training.ClipModels(student=str(place / "student.json")),
            data=recipe.ImageData(prompts="three.json"),
            loss=recipe.Loss(class_prior=True),
            optimisation=training.ClipOptimisation(steps=9, batch_size=8),
            run=training.RunFlags(workers=0),
            evaluation=training.ClipEvaluation(eval_data=("colours",), dataset_root=str(tmp_path / "{dataset}")),
        )
    )
    (folder,) = (tmp_path / "runs").iterdir()
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {"train/soft_ce", "train/wmse"} <= set(records[0]) and records[0]["train/lr"] == pytest.approx(3e-3)
    assert {(r["model"], r["dataset"]) for r in records if "model" in r} == {
        ("student", "colours"),
        ("teacher", "colours"),
    }
    assert "bundled emoji (Noto, Twemoji)" in (folder / "model" / "README.md").read_text()


def test_a_resumed_run_is_the_one_that_was_never_stopped(place, call):
    """Templates drawn, and a prior that was rolled, before and after; patches drop by torch's generator."""
    pictures = [{"bytes": picture(list(COLOURS)[n % 3], size=6 + n % 4), "path": None} for n in range(12)]
    datasets.Dataset.from_dict({"img": pictures}).to_parquet("t.parquet")
    flags = flags_of(place, "--train-data", "t.parquet", "--prompts", place / "colours.json", "--steps", "6")
    flags += [
        "--class-prior",
        "--warmup",
        "2",
        "--ema-decay",
        "0.5",
        "--checkpoint-every-steps",
        "2",
        "--accum-steps",
        "1",
    ]
    for name in ("whole", "stopped"):
        code, _, errors = call(*flags, "--output-dir", name, recipe=RECIPE)
        assert code == 0, errors
    want = test_resume.state(Path("whole"))
    test_resume.assert_bitwise(test_resume.state(Path("stopped")), want)
    for step in (4, 6):  # as if it had been stopped after the second step, in the middle of a pass
        checkpoint = Path("stopped/checkpoints") / f"step_{step:08d}"
        checkpoint.rename(f"later_{step}")
    code, _, errors = call(*flags, "--output-dir", "stopped", "--resume", "latest", recipe=RECIPE)
    assert code == 0, errors
    test_resume.assert_bitwise(test_resume.state(Path("stopped")), want)
    memory = "checkpoints/step_00000006/memory_0.safetensors"
    got, wanted = (test_resume.load_file(Path(name) / memory) for name in ("stopped", "whole"))
    test_resume.assert_bitwise(got, wanted)
    assert wanted["updates"] == 6 and wanted["images"] == 24 and wanted["epoch"] == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompts", "{place}/no_place.json"], "the template 'a square' has no place for the class name: write {c}"),
        (["--prompts", "{place}/strange.json"], "has the class 'bleu', which the data lacks: did you mean 'blue'?"),
        (["--prompts", "{place}/none.json"], "none.json' does not exist"),
        (["--teacher", "none"], "`none` has no place among teachers: leave it out"),
        (
            ["--soft-ce-weight", "0", "--wmse-weight", "0"],
            "no other term trains the student's text tower, so set one of them",
        ),
        (["--train-data", "{place}/none.tar"], "none.tar' does not exist"),
        (
            ["--train-data", "{place}/shard.tar", "--class-prior"],
            "put sizes.json beside the shards, or give --no-class",
        ),
        (["--class-prior", "--steps", "6"], "and the run sees 24 of 25 images: train longer, or give --no-class-prior"),
        (["--epochs", "9"], "--steps 9 and --epochs 9 exclude each other: give one"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(place, call, flags, message):
    usual = ["--train-data", place / "images", "--prompts", place / "colours.json", "--steps", "9"]
    flags = [flag.replace("{place}", str(place)) for flag in flags]
    code, _, told = call(*flags_of(place, *usual, *flags), recipe=RECIPE)
    assert code == 2 and message in told and len(told.strip().splitlines()) == 1, told
    assert not Path("runs").exists()  # what never started leaves no folder


def test_a_missing_flag_is_one_line_and_code_2(place, call):
    shard = ["--train-data", f"{place}/shard.tar", "--prompts", f"{place}/colours.json"]
    for flags, message in [
        (["--train-data", "x"], "--train-data x needs classes for the teacher's logits: give --prompts"),
        ([*shard, "--epochs", "9"], "--epochs needs the size of"),
        (shard, "--train-data needs --steps or --epochs"),
    ]:
        code, _, told = call(*flags_of(place, *flags), recipe=RECIPE)
        assert code == 2 and message in told and len(told.strip().splitlines()) == 1, told
    code, _, told = call("--teacher", "none", recipe=RECIPE)
    assert code == 2 and "the teacher's logits are the only target, so name a teacher" in told
