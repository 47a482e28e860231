"""One tower trained into a teacher's space: the joined model, the loss, the recipe, and search in a teacher's index."""

import dataclasses
import json
import re
from pathlib import Path

import open_clip
import pytest
import test_recipes
import test_resume
import torch
import torch.nn.functional as F
from helpers import run_ranks
from PIL import Image
from small_models import CONFIG, colour_blind_clip
from small_sets import COLOURS, colour_set, picture, write_shard

from gkl_vl.errors import UserError
from gkl_vl.export.hub import export_clip
from gkl_vl.losses.gkl import GklSettings
from gkl_vl.models.clip import load_clip
from gkl_vl.models.modes import freeze
from gkl_vl.models.student import OneTower, paired, with_tower_of
from gkl_vl.models.towers import clamp_scale
from gkl_vl.objectives.one_tower import OneTowerKd
from gkl_vl.teachers.bank import Bank
from gkl_vl.training.optim import clip_adamw

call = test_recipes.call  # the fixture
pytestmark = pytest.mark.usefixtures("one_thread")
TEACHER = CONFIG | {"embed_dim": 20, "init_logit_bias": -3.0, "quick_gelu": True}
TEACHER["vision_cfg"] = CONFIG["vision_cfg"] | {"image_size": 24, "width": 48}
TEACHER["text_cfg"] = CONFIG["text_cfg"] | {"context_length": 12, "width": 48, "heads": 3}
CROSS = GklSettings(soft_ce_weight=1.5, wmse_weight=0.4, gamma=0.7)
NO_CROSS = GklSettings(soft_ce_weight=0.0, wmse_weight=0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A teacher with weights, a smaller student without, coloured squares with captions, prompts."""
    place = tmp_path_factory.mktemp("one_tower")
    for name, config in (("teacher", TEACHER), ("student", CONFIG)):
        (place / f"{name}.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    teacher = load_clip(str(place / "teacher.json"))
    with torch.no_grad():
        teacher.towers.model.logit_scale.fill_(5.0)  # above CLIP's bound of log 100, as in SigLIP
    export_clip(clip=teacher, folder=place / "teacher", card=test_recipes.CARD)
    colours = [list(COLOURS)[n % 3] for n in range(24)]
    pairs = [
        (f"{n}", {"png": picture(c, size=6 + n % 4), "txt": f"a {c} square".encode()}) for n, c in enumerate(colours)
    ]
    write_shard(place / "pairs.tar", pairs)
    prompts = {"classnames": list(COLOURS), "templates": ["{c}", "a {c} square"]}
    (place / "colours.json").write_text(json.dumps(prompts))
    return place


def clips(place: Path):
    """Student and frozen teacher."""
    torch.manual_seed(2)
    return load_clip(str(place / "student.json")), freeze(load_clip(f"local-dir:{place}/teacher"))


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Up to the rounding of attention, which has another kernel with gradients."""
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-6)


# ---- the joined model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_joined_model_has_the_students_tower_and_the_rest_of_the_teacher(place, side):
    student, teacher = clips(place)
    joined = with_tower_of(student, teacher, side)
    pixels = torch.rand(3, 3, joined.image_size, joined.image_size)
    texts = ["a red square", "something else &amp; long"]
    tokens, own = joined.tokenize(texts), joined.towers.eval()
    assert joined.image_size == (16 if side == "image" else 24) and tokens.shape[1] == (12 if side == "image" else 16)
    assert own.encode_image(pixels).shape == (3, 20) and own.encode_text(tokens).shape == (2, 20)
    assert own.log_scale().item() == 5.0 and own.bias().item() == -3.0 and joined.embed_dim == 20
    if side == "image":
        same(own.encode_text(tokens), teacher.towers.encode_text(tokens))
    else:
        same(own.encode_image(pixels), teacher.towers.encode_image(pixels))
    theirs, anew = student.towers.state_dict(), []
    for name, tensor in own.state_dict().items():
        of_image = name.startswith("model.visual.")
        if name.startswith("model.logit_") or of_image != (side == "image"):
            continue
        if tensor.shape != theirs[name].shape:
            anew.append(name)
        else:
            assert torch.equal(tensor, theirs[name]), name
    assert anew == (["model.visual.proj"] if side == "image" else ["model.text_projection"])


@pytest.mark.parametrize("side", ["image", "text"])
def test_one_tower_trains_it_alone(place, side):
    student, teacher = clips(place)
    joined = with_tower_of(student, teacher, side)
    model = OneTower(joined.towers, side)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = torch.rand(4, 3, 16, 16) if side == "image" else joined.tokenize(["a", "b c", "d", "e f g"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model.train()
    model(inputs)[:, 0].sum().backward()
    optimizer.step()
    clamp_scale(joined.towers)
    groups = clip_adamw(model, of_text=model.text_parameters(), lr=1.0, text_lr=1.0, wd=0.1).param_groups
    assert len(groups) == 2 and all(group["params"] for group in groups)  # torch restores no sharded empty ones
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    of_side = [name for name in before if name.startswith("towers.model.visual.") == (side == "image")]
    assert changed and changed <= {name for name in of_side if "logit_" not in name}
    assert all(name in changed for name in of_side if name.endswith("c_fc.weight"))


def test_models_that_cannot_be_joined_are_refused_in_one_line(place, tmp_path):
    student, teacher = clips(place)
    with_weights = tmp_path / "plain"
    export_clip(clip=student, folder=with_weights, card=test_recipes.CARD)
    trained = load_clip(f"local-dir:{with_weights}")
    coca = dataclasses.replace(teacher, model_cfg=TEACHER | {"multimodal_cfg": {}}, name="coca")
    flat = {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "none"}
    (tmp_path / "flat.json").write_text(json.dumps(CONFIG | {"embed_dim": 64, "vision_cfg": flat}))
    for parts, message in (
        ((student, coca), "--teacher coca is a CoCa, whose towers return tokens as well"),
        (
            (load_clip(str(tmp_path / "flat.json")), teacher),
            "has no projection and a width of 64, .* of 20",
        ),
        ((trained, teacher), "was trained with GELU and its teacher with QuickGELU, and a model has one activation"),
        ((student, paired(image_of=teacher, text_of=teacher)), "is a transformers model, whose towers cannot join"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            with_tower_of(*parts, "image")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="embeddings of length 12 and .* of 20: its images and texts cannot"):
        paired(image_of=student, text_of=teacher)


def test_a_pair_has_the_images_of_one_and_the_texts_of_the_other(place):
    student, teacher = clips(place)
    joined = with_tower_of(student, teacher, "image")
    pair = paired(image_of=joined, text_of=teacher)
    pixels, tokens = torch.rand(2, 3, 16, 16), teacher.tokenize(["a", "b"])
    assert torch.equal(pair.towers.encode_image(pixels), joined.towers.encode_image(pixels))
    assert torch.equal(pair.towers.encode_text(tokens), teacher.towers.encode_text(tokens))
    assert torch.equal(pair.towers.encode_text_by_length(tokens), teacher.towers.encode_text_by_length(tokens))
    assert pair.embed_dim == 20 and pair.tokenize is teacher.tokenize and pair.image_size == 16
    assert pair.towers.log_scale().item() == 5.0 and pair.towers.bias().item() == -3.0


# ---- the loss ----------------------------------------------------------------------------------------------------


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def objective_of(**settings) -> OneTowerKd:
    """Its loss needs neither student nor teacher."""
    return OneTowerKd(student=colour_blind_clip(), teacher=lambda batch: {}, **settings)


def naive(x, z, columns, *, scale, bias):
    """Cross GKL as in its docstring; a SigLIP teacher has binary decisions."""
    s, t = scale * x @ columns.T, scale * z @ columns.T
    w = (CROSS.gamma * t).softmax(1)
    d = t - s
    wmse = 0.5 * (w * (d - (w * d).sum(1, keepdim=True)).square()).sum(1).mean()
    if bias is None:
        soft_ce = -(t.softmax(1) * s.log_softmax(1)).sum(1).mean()
    else:
        p = torch.sigmoid(t + bias)
        soft_ce = -(p * F.logsigmoid(s + bias) + (1 - p) * F.logsigmoid(-s - bias)).sum(1).mean()
    return CROSS.soft_ce_weight * soft_ce + CROSS.wmse_weight * wmse


@pytest.mark.parametrize("bias", [None, -2.0])
@pytest.mark.parametrize("captions", [(), (2,)])
def test_the_loss_equals_its_formula_in_value_and_gradient(captions, bias):
    """Captions against the images of two updates; images against prompts are the same with fixed columns."""
    bank = Bank(9)
    objective = objective_of(side="text", mimicry_weight=7.0, cross=CROSS, columns=bank)
    images = [unit(5, 4, seed=k) for k in (1, 2)]
    for update in (0, 1):
        rows = unit(5, *captions, 4, seed=10 + update).requires_grad_()
        goal = unit(5, *captions, 4, seed=20 + update)
        columns = torch.cat(images[: update + 1])[-9:]
        x, z = rows.flatten(0, -2), goal.flatten(0, -2)
        expected = 7 * (x - z).square().mean() + naive(x, z, columns, scale=9.0, bias=bias)
        targets = {"teacher_text": goal, "teacher_image": images[update], "teacher_logit_scale": torch.tensor(9.0)}
        targets |= {} if bias is None else {"teacher_logit_bias": torch.tensor(bias)}
        with objective.around_update([]):
            loss, scalars = objective.loss({"rows": rows}, targets)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
        (got,), (want,) = torch.autograd.grad(loss, [rows]), torch.autograd.grad(expected, [rows])
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        assert scalars["cosine"].item() == pytest.approx((x * z).sum(1).mean().item(), rel=1e-6)
    assert set(objective.state()) == {"bank", "bank_seen"}


def test_without_cross_logits_the_loss_is_mimicry():
    rows, goal = unit(5, 4, seed=1), unit(5, 4, seed=2)
    objective = objective_of(side="image", mimicry_weight=3.0, cross=NO_CROSS, columns=None)
    loss, scalars = objective.loss({"rows": rows}, {"teacher_image": goal})
    assert loss.item() == pytest.approx(3 * (rows - goal).square().mean().item()) and set(scalars) == {
        "mimicry",
        "cosine",
    }
    assert objective.state() == {}


def loss_and_gradient(rank, world_size):
    own = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    rows, goal, images = (unit(8, 4, seed=seed)[own] for seed in (1, 2, 3))
    rows.requires_grad_()
    objective = objective_of(side="text", mimicry_weight=7.0, cross=CROSS, columns=Bank(0))
    targets = {"teacher_text": goal, "teacher_image": images, "teacher_logit_scale": torch.tensor(9.0)}
    loss, scalars = objective.loss({"rows": rows}, targets)
    loss.backward()
    return loss.item(), rows.grad, {name: value.item() for name, value in scalars.items()}


def test_two_processes_equal_one_on_the_joined_batch():
    loss, gradient, scalars = loss_and_gradient(0, 1)
    ranks = run_ranks(loss_and_gradient, 2)
    for value, _, logged in ranks:
        assert value == pytest.approx(loss, rel=1e-9) and logged == pytest.approx(scalars, rel=1e-6)
    torch.testing.assert_close(torch.cat([g for _, g, _ in ranks]) / 2, gradient, rtol=1e-9, atol=1e-12)


# ---- the recipe --------------------------------------------------------------------------------------------------


RECIPE = "clip_image_tower"


def flags_of(place: Path, *flags: object) -> list[object]:
    own = ["--student", place / "student.json", "--train-data", place / "pairs.tar", "--workers", "0"]
    return [*own, "--batch-size", "8", "--steps", "6", "--warmup", "2", *flags]


def image_of(colour: str) -> Image.Image:
    return Image.new("RGB", (30, 20), COLOURS[colour])


def exported_and_trained(run: str):
    """The exported model as open_clip loads it, and ours."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{run}/model")
    return model.eval(), preprocess, load_clip(run)


def test_the_student_searches_an_index_of_the_teachers(place, call, tmp_path):
    """Images alone, with prompts. The export needs open_clip alone."""
    flags = flags_of(place, "--teacher", f"local-dir:{place}/teacher", "--prompts", place / "colours.json")
    flags += ["--steps", "80", "--lr", "1e-2"]
    colour_set(tmp_path / "colours", list(COLOURS))
    sets = ["--eval-data", "colours", "--dataset-root", str(tmp_path / "{dataset}")]
    code, told, errors = call(*flags, *sets, "--output-dir", "run", recipe=RECIPE)
    assert code == 0, errors
    assert ", image tower" in told
    model, preprocess, ours = exported_and_trained("run")
    teacher = freeze(load_clip(f"local-dir:{place}/teacher"))
    texts = ["a red square", "blue"]
    tokens = open_clip.get_tokenizer("local-dir:run/model")(texts)
    assert torch.equal(tokens, teacher.tokenize(texts))
    same(model.encode_text(tokens, normalize=True), teacher.towers.encode_text(tokens))
    images = [image_of(colour) for colour in COLOURS]
    index = teacher.towers.encode_image(torch.stack([teacher.image_transform()(image) for image in images]))
    queries = model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
    assert (queries @ index.T).argmax(1).tolist() == [0, 1, 2]
    assert (queries * index).sum(1).min() > 0.9
    own = freeze(ours).towers.encode_image(torch.stack([ours.image_transform()(image) for image in images]))
    same(queries, own)
    records = [json.loads(line) for line in Path("run/results.jsonl").read_text().splitlines()]
    assert {"train/mimicry", "train/cross_soft_ce", "train/cross_wmse", "train/cosine"} <= set(records[0])
    card = Path("run/model/README.md").read_text()
    assert "Only the image tower was trained, into the teacher's embedding space." in card


def test_a_text_tower_from_a_store_resumes_and_keeps_the_teachers_images(place, call):
    """Six updates on captions; the store holds one view of each image and the teacher is named in it."""
    teacher = ["--teacher", f"local-dir:{place}/teacher"]
    data = ["--train-data", place / "pairs.tar"]
    code, _, errors = call(*data, *teacher, "--views", "1", "--out", "store", "--workers", "0", recipe="store_teacher")
    assert code == 0, errors
    flags = flags_of(place, "--text-only", "--teacher-store", "store", "--bank-size", "12", "--ema-decay", "0.5")
    flags += ["--checkpoint-every-steps", "3"]
    for name in ("whole", "stopped"):
        code, told, errors = call(*flags, "--output-dir", name, recipe=RECIPE)
        assert code == 0, errors
    assert ", text tower" in told
    want = test_resume.state(Path("whole"))
    Path("stopped/checkpoints/step_00000006").rename("later")
    code, _, errors = call(*flags, "--output-dir", "stopped", "--resume", "latest", recipe=RECIPE)
    assert code == 0, errors
    test_resume.assert_bitwise(test_resume.state(Path("stopped")), want)
    model, preprocess, _ = exported_and_trained("whole")
    original = freeze(load_clip(f"local-dir:{place}/teacher"))
    pixels = preprocess(image_of("red"))[None]
    same(model.encode_image(pixels, normalize=True), original.towers.encode_image(pixels))
    assert "Only the text tower was trained" in Path("whole/model/README.md").read_text()


@pytest.mark.parametrize(
    "named, message",
    [
        (["--teacher", "local-dir:other"], "with a cosine of -?0.* it is not the local-dir:.*teacher of the store"),
        (["--teacher", "local-dir:other", "bundled"], "the store has one teacher, so name that one"),
    ],
)
def test_another_teacher_than_the_stored_is_refused(place, call, named, message):
    """With the same logit scale and length of embeddings."""
    torch.manual_seed(7)
    other = load_clip(str(place / "teacher.json"))
    with torch.no_grad():
        other.towers.model.logit_scale.fill_(5.0)
    export_clip(clip=other, folder=Path("other"), card=test_recipes.CARD)
    data = ["--train-data", place / "pairs.tar", "--teacher", f"local-dir:{place}/teacher", "--workers", "0"]
    code, _, errors = call(*data, "--views", "1", "--out", "store", recipe="store_teacher")
    assert code == 0, errors
    code, _, errors = call(*flags_of(place, "--text-only", "--teacher-store", "store", *named), recipe=RECIPE)
    assert code == 2 and re.search(message, errors) and errors.count("\n") == 1, errors
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--teacher", "none"], "--teacher none: a tower is trained into its teacher's space, so name a teacher"),
        (["--teacher", "bundled", "local-dir:{place}/teacher"], "2 teachers, and the student can take weights of one"),
        (["--cross-wmse-weight", "3"], "--cross-wmse-weight 3 compares images with texts, and there are none"),
        (["--mimicry-weight", "0"], "every weight is 0, so there is nothing to train on: set --mimicry-weight"),
        (["--captions-per-image", "2"], "--captions-per-image 2 is of captions, and an image tower is trained without"),
        (["--columns", "a", "b"], "--columns a b: the second is of captions"),
        (["--bank-size", "9"], "--bank-size 9 has no effect without --text-only"),
        (["--text-lr", "1"], "--text-lr 1.0 has no effect without --text-only"),
        (
            ["--text-only", "--bank-size", "9", "--cross-soft-ce-weight", "0", "--cross-wmse-weight", "0"],
            "--bank-size 9 has no effect where both cross weights are 0",
        ),
        (["--text-only", "--prompts", "{place}/colours.json"], "is for images, and has no effect with --text-only"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(place, call, flags, message):
    given = [flag.format(place=place) for flag in flags]
    code, _, errors = call(*flags_of(place), *given, recipe=RECIPE)
    assert code == 2 and message in errors and errors.count("\n") == 1, errors
    assert not Path("runs").exists()
