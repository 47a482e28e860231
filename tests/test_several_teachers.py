"""Several teachers: their targets against a naive formula; one store, two stores and online; flags."""

import json
import shutil
from pathlib import Path

import pytest
import test_recipes
import torch
import torch.nn.functional as F
from small_models import CONFIG, tiny_clip
from test_recipes import CARD
from test_teacher_store import pattern_shards

from gkl_vl.data.pairs import open_source
from gkl_vl.export.hub import export_clip
from gkl_vl.losses.gkl import GklSettings
from gkl_vl.models.clip import load_clip
from gkl_vl.models.student import Student
from gkl_vl.objectives.clip import ClipKd, ClipKdWeights
from gkl_vl.objectives.zero_shot import ZeroShotKd
from gkl_vl.teachers.bank import Bank
from gkl_vl.teachers.embeddings import open_stores, stored_teacher

call = test_recipes.call
DIMS, SCALES, SHARES, ROWS = [5, 3], [11.0, 6.0], [0.75, 0.25], 4
GKL = GklSettings(soft_ce_weight=1.3, wmse_weight=0.2, gamma=0.5)
CROSS = GklSettings(soft_ce_weight=0.7, wmse_weight=0.9, gamma=0.5)


def unit(*shape: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=draw, dtype=torch.float64), dim=-1)


def naive_gkl(s, t, settings, *, average_rows=False) -> torch.Tensor:
    """GKL of [n, K] logits with the [n, K, K] tensor. `average_rows`: wMSE is a mean over rows, not a ratio of sums."""
    w = t.softmax(1) ** settings.gamma
    squares = ((t - s)[:, :, None] - (t - s)[:, None, :]) ** 2
    rows = 0.25 * (w[:, :, None] * w[:, None, :] * squares).sum((1, 2))
    weights = w.sum(1) ** 2
    wmse = (rows / weights).mean() if average_rows else rows.sum() / weights.sum()
    return settings.soft_ce_weight * -(t.softmax(1) * s.log_softmax(1)).sum(1).mean() + settings.wmse_weight * wmse


# ---- the objectives


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Prepares images; its towers have no part in the losses."""
    return tiny_clip(tmp_path_factory.mktemp("student"))


def test_the_loss_on_captions_is_the_sum_over_teachers_of_the_naive_terms(student):
    """Two captions an image; soft targets averaged, wMSE of mean logits, mimicry and cross logits in each space."""
    image, text = unit(ROWS, 6, seed=0), unit(ROWS, 2, 6, seed=1)
    mapped = {side: [unit(ROWS, *c, dim, seed=2 + dim) for dim in DIMS] for side, c in (("image", ()), ("text", (2,)))}
    theirs_image = [unit(ROWS, dim, seed=20 + dim) for dim in DIMS]
    theirs_text = [unit(ROWS, 2, dim, seed=30 + dim) for dim in DIMS]
    leaves = [image, text, *mapped["image"], *mapped["text"]]
    for leaf in leaves:
        leaf.requires_grad_()

    expected = torch.zeros((), dtype=torch.float64)
    s = 9 * image @ text.flatten(0, 1).T
    t = [scale * i @ x.flatten(0, 1).T for scale, i, x in zip(SCALES, theirs_image, theirs_text, strict=True)]
    of_texts = torch.eye(ROWS, dtype=torch.float64).repeat_interleave(2, dim=0)  # each caption has its image
    for rows, teachers, own in ((s, t, of_texts.T / 2), (s.T, [logits.T for logits in t], of_texts)):
        mean = SHARES[0] * teachers[0] + SHARES[1] * teachers[1]
        soft = SHARES[0] * teachers[0].softmax(1) + SHARES[1] * teachers[1].softmax(1)
        contrastive = -(own * rows.log_softmax(1)).sum(1).mean()
        soft_ce = -(soft * rows.log_softmax(1)).sum(1).mean()
        only_wmse = GklSettings(soft_ce_weight=0.0, wmse_weight=GKL.wmse_weight, gamma=GKL.gamma)
        expected = expected + (contrastive + GKL.soft_ce_weight * soft_ce + naive_gkl(rows, mean, only_wmse)) / 2
    for k, share in enumerate(SHARES):
        images, texts = mapped["image"][k], mapped["text"][k].flatten(0, 1)
        goal, text_goal = theirs_image[k], theirs_text[k].flatten(0, 1)
        mimicry = F.mse_loss(images, goal) + F.mse_loss(texts, text_goal)
        of_images = naive_gkl(
            *(SCALES[k] * x @ theirs_text[k][:, 0].T for x in (images, goal)), CROSS, average_rows=True
        )
        of_texts = naive_gkl(*(SCALES[k] * x @ goal.T for x in (texts, text_goal)), CROSS, average_rows=True)
        expected = expected + share * (8 * mimicry + (of_images + of_texts) / 2)
    wanted = torch.autograd.grad(expected, leaves)

    targets = {"text_ids": torch.arange(2 * ROWS).view(ROWS, 2)}
    for k, suffix in enumerate(("", ".1")):
        targets |= {f"teacher_image{suffix}": theirs_image[k], f"teacher_text{suffix}": theirs_text[k]}
        targets[f"teacher_logit_scale{suffix}"] = torch.tensor(SCALES[k], dtype=torch.float64)
    outputs = {"image": image, "text": text, "logit_scale": torch.tensor(9.0, dtype=torch.float64)}
    outputs |= {f"mapped_{side}": torch.cat(parts, dim=-1) for side, parts in mapped.items()}
    weights = ClipKdWeights(contrastive_weight=1.0, mimicry_weight=8.0, gkl=GKL, cross=CROSS)
    objective = ClipKd(student=student, teacher=lambda b: {}, weights=weights, bank=Bank(0), teacher_weights=SHARES)
    loss, scalars = objective.loss(outputs, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for got, want in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    averaged = {"soft_ce", "mimicry", "cross_soft_ce", "cross_wmse"}
    of_one = averaged | {"agreement@1", "teacher_entropy", "teacher_logit_scale"}
    assert {f"{name}.{k}" for name in of_one for k in (0, 1)} <= set(scalars) and of_one & set(scalars) == averaged
    for name in averaged:
        mean = SHARES[0] * scalars[f"{name}.0"] + SHARES[1] * scalars[f"{name}.1"]
        assert scalars[name].item() == pytest.approx(mean.item(), rel=1e-6)


def test_the_loss_on_class_prompts_has_the_averaged_targets_of_all_teachers(student):
    classes = [unit(7, dim, seed=40 + dim) for dim in DIMS]
    images = [unit(ROWS, dim, seed=50 + dim) for dim in DIMS]
    logits = 5 * unit(ROWS, 7, seed=60)
    mapped = [unit(ROWS, dim, seed=70 + dim) for dim in DIMS]
    leaves = [logits, *mapped]
    for leaf in leaves:
        leaf.requires_grad_()
    t = [scale * i @ c.T for scale, i, c in zip(SCALES, images, classes, strict=True)]
    mean = SHARES[0] * t[0] + SHARES[1] * t[1]
    expected = naive_gkl(logits, mean, GklSettings(soft_ce_weight=0.0, wmse_weight=GKL.wmse_weight, gamma=GKL.gamma))
    for k, share in enumerate(SHARES):
        soft_ce = -(t[k].softmax(1) * logits.log_softmax(1)).sum(1).mean()
        cross = naive_gkl(SCALES[k] * mapped[k] @ classes[k].T, t[k], CROSS, average_rows=True)
        expected = expected + share * (GKL.soft_ce_weight * soft_ce + cross)
    wanted = torch.autograd.grad(expected, leaves)

    def teacher(batch: dict) -> dict[str, torch.Tensor]:
        scales = [torch.tensor(scale, dtype=torch.float64) for scale in SCALES]
        first = {"teacher_image": images[0], "teacher_logit_scale": scales[0]}
        return first | {"teacher_image.1": images[1], "teacher_logit_scale.1": scales[1]}

    objective = ZeroShotKd(
        student=student,
        teacher=teacher,
        classes=classes,
        tokens=[],
        gkl=GKL,
        cross=CROSS,
        prior=None,
        num_images=None,
        seed=0,
        teacher_weights=SHARES,
    )
    outputs = {"logits": logits, "mapped_image": torch.cat(mapped, dim=1)}
    loss, scalars = objective.loss(outputs, objective.targets({}))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for got, want in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    average = 0.75 * scalars["soft_ce.0"] + 0.25 * scalars["soft_ce.1"]
    assert scalars["soft_ce"].item() == pytest.approx(average.item(), rel=1e-6)
    assert {"agreement@1.0", "agreement@1.1", "cross_wmse.0", "cross_wmse.1"} <= set(scalars)


# ---- students, stores and recipes


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two teachers of different dimensions with weights, a student's config, shards, prompts."""
    place = tmp_path_factory.mktemp("several")
    for number, dim in enumerate(DIMS):
        (place / "config.json").write_text(json.dumps(CONFIG | {"embed_dim": dim}))
        torch.manual_seed(number)
        export_clip(clip=load_clip(f"{place}/config.json"), folder=place / f"teacher_{number}", card=CARD)
    (place / "student.json").write_text(json.dumps(CONFIG))
    pattern_shards(place, 2, 6)
    prompts = {"classnames": ["one", "two", "six"], "templates": ["{c}", "a {c}"]}
    (place / "prompts.json").write_text(json.dumps(prompts))
    return place


def teachers_of(place: Path, *numbers: int) -> list[object]:
    return ["--teacher", *(f"local-dir:{place}/teacher_{number}" for number in numbers)]


def run_flags(place: Path, *flags: object) -> list[object]:
    data = ["--student", f"{place}/student.json", "--train-data", f"{place}/{{000..001}}.tar", "--batch-size", "4"]
    return [*data, "--steps", "3", "--workers", "0", "--output-dir", "run", *flags]


def store_flags(place: Path, out: str, *flags: object) -> list[object]:
    data = ["--train-data", f"{place}/{{000..001}}.tar", "--views", "2", "--workers", "0"]
    return [*data, "--out", out, *flags]


def last_record() -> dict:
    return json.loads(Path("run/results.jsonl").read_text().splitlines()[-1])


def test_the_maps_into_the_spaces_of_all_teachers_are_one_matrix(place):
    model = Student(load_clip(f"{place}/student.json").towers, embed_dim=12, teacher_dims=DIMS, mapped=("image",))
    output = model(torch.randn(2, 3, 16, 16), torch.randint(1, 99, (2, 16)))
    first, second = output["mapped_image"].split(DIMS, dim=1)
    for part, weight in zip((first, second), model.image_map.weight.split(DIMS), strict=True):
        torch.testing.assert_close(part, F.normalize(output["image"] @ weight.T, dim=1))
    assert "mapped_text" not in output and not list(model.text_map.parameters())


def test_a_run_has_the_log_and_the_card_of_two_online_teachers(place, call):
    scales = ["--teacher-scale", "60", "70", "--teacher-shares", "3", "1", "--cross-wmse-weight", "6"]
    code, out, errors = call(*run_flags(place, *teachers_of(place, 0, 1), *scales))
    assert code == 0, errors
    assert f"local-dir:{place}/teacher_0 + local-dir:{place}/teacher_1" in out
    last = last_record()
    for name in ("soft_ce", "mimicry", "cross_wmse"):
        mean = 0.75 * last[f"train/{name}.0"] + 0.25 * last[f"train/{name}.1"]
        assert last[f"train/{name}"] == pytest.approx(mean, rel=1e-5)
    for name in ("agreement@1", "teacher_entropy"):
        assert {f"train/{name}.0", f"train/{name}.1"} <= set(last) and f"train/{name}" not in last
    assert [last[f"train/teacher_logit_scale.{k}"] for k in (0, 1)] == [60, 70]
    assert (
        f"- Teachers: `local-dir:{place}/teacher_0`, `local-dir:{place}/teacher_1`"
        in Path("run/model/README.md").read_text()
    )


def test_two_teachers_in_one_store_and_in_two_are_the_same(place, call):
    for out, numbers in (("both", (0, 1)), ("first", (0,)), ("second", (1,))):
        code, told, errors = call(*store_flags(place, out, *teachers_of(place, *numbers)), recipe="store_teacher")
        assert code == 0 and "on 12 pairs · 2 views" in told, errors
    source = open_source(f"{place}/{{000..001}}.tar")
    one, two = open_stores(["both"]), open_stores(["first", "second"])
    assert [teacher.name for teacher in one.teachers] == [teacher.name for teacher in two.teachers]
    for pair in (pair for block in (0, 1) for pair in source.pairs.read(block)):
        a, b = (stores.of_pair(pair, 1, [0]) for stores in (one, two))
        assert set(a) == {"teacher_image", "teacher_text", "teacher_image.1", "teacher_text.1"} == set(b)
        assert all(torch.equal(a[name], b[name]) for name in a)
        embedded = stored_teacher(one.teachers, torch.device("cpu"))(a)
        assert [embedded[name].shape[-1] for name in ("teacher_image", "teacher_image.1")] == DIMS
    stores = ["--teacher-store", "first", "second", "--captions-per-image", "2", "--accum-steps", "2"]
    code, _, errors = call(*run_flags(place, *stores, "--cross-wmse-weight", "6"))
    assert code == 0, errors
    assert {"train/mimicry.0", "train/mimicry.1"} <= set(last_record())


def test_stores_with_other_numbers_of_views_are_refused(place, call):
    for out, views in (("two", "2"), ("three", "3")):
        flags = [*store_flags(place, out, *teachers_of(place, 0)), "--views", views]
        assert call(*flags, recipe="store_teacher")[0] == 0
    code, _, errors = call(*run_flags(place, "--teacher-store", "two", "three"))
    assert code == 2 and "--teacher-store three has 3 views of each image, two has 2: build one of them again" in errors
    assert not Path("run").exists()


def test_a_store_of_images_alone_has_the_class_prompts(place, call):
    """Other prompts are refused, and replaced without embedding an image again."""
    prompts = ["--prompts", f"{place}/prompts.json"]
    build = store_flags(place, "store", *teachers_of(place, 0, 1))
    code, told, errors = call(*build, *prompts, recipe="store_teacher")
    assert code == 0 and "on 12 images · 2 views" in told, errors
    run = run_flags(place, "--teacher-store", "store", "--cross-wmse-weight", "6", "--class-prior", "--steps", "7")
    code, _, errors = call(*run, *prompts, recipe="clip_unlabelled")
    assert code == 2 and "put sizes.json beside the shards" in errors
    run = [flag for flag in run if flag != "--class-prior"]
    code, _, errors = call(*run, *prompts, recipe="clip_unlabelled")
    assert code == 0, errors
    assert {"train/soft_ce", "train/soft_ce.1", "train/cross_wmse.0"} <= set(last_record())

    Path("prompts.json").write_text(json.dumps({"classnames": ["one", "two", "ten"], "templates": ["{c}"]}))
    code, _, errors = call(*run, "--prompts", "prompts.json", "--output-dir", "other", recipe="clip_unlabelled")
    assert code == 2 and "of other class names or templates than --prompts" in errors and not Path("other").exists()
    before = Path("store/00000.safetensors").stat().st_mtime_ns
    assert call(*build, "--prompts", "prompts.json", recipe="store_teacher")[0] == 0
    assert Path("store/00000.safetensors").stat().st_mtime_ns == before
    code, _, errors = call(*run, "--prompts", "prompts.json", "--output-dir", "other", recipe="clip_unlabelled")
    assert code == 0, errors
    code, told, errors = call(*store_flags(place, "third", *teachers_of(place, 1), *prompts), recipe="store_teacher")
    assert code == 0, errors
    shutil.copy("third/classes.safetensors", "store/classes.safetensors")
    code, _, errors = call(*run, *prompts, "--output-dir", "fourth", recipe="clip_unlabelled")
    assert code == 2 and "classes.safetensors is of another store than its manifest.json" in errors
    code, _, errors = call(*run_flags(place, "--teacher-store", "store", "--output-dir", "pairs"))
    assert code == 2 and "was built on images alone: build another without --prompts, for captions" in errors
    Path("store/classes.safetensors").unlink()
    code, _, errors = call(*run, "--prompts", "prompts.json", "--output-dir", "third", recipe="clip_unlabelled")
    assert code == 2 and "classes.safetensors, the teacher's embeddings of the class prompts, is missing" in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher", "none", "bundled"], "--teacher none bundled: `none` has no place among teachers"),
        (["--teacher", "bundled", "--teacher", "bundled"], "--teacher bundled bundled names one twice"),
        (["--teacher-shares", "1", "2"], "--teacher-shares has 2 values for 1 teachers"),
        (["--teacher-scale", "0"], "--teacher-scale 0.0 must be above 0"),
        (["--teacher-pretrained", "none", "openai"], "--teacher-pretrained has 2 values for 1 teachers"),
        (["--teacher", "none", "--teacher-scale", "50"], "--teacher-scale 50.0 has no effect with --teacher none"),
        (["--teacher"], "--teacher has no value: give one, or leave it out"),
        (["--teacher-store"], "--teacher-store has no value: give one, or leave it out"),
        (["--teacher-store", "a", "a"], "--teacher-store a a names one twice: leave one out"),
    ],
)
def test_flags_that_do_not_fit_the_teachers_are_refused(call, flags, message):
    code, _, errors = call("--output-dir", "run", *flags)
    assert code == 2 and message in errors and errors.count("\n") == 1, errors
    assert not Path("run").exists()
