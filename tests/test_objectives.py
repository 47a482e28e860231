"""The objective of CLIP distillation is the sum of its terms, and the teacher is frozen."""

import dataclasses
import json

import pytest
import torch
from accelerate import Accelerator
from open_clip.transform import PreprocessCfg

from gkl_vl.losses.cross_logits import cross_logits_loss
from gkl_vl.losses.gkl import GklSettings
from gkl_vl.losses.image_text import image_text_loss, mimicry_loss
from gkl_vl.models.clip import MODEL_CONFIGS, Clip, load_clip
from gkl_vl.models.modes import freeze
from gkl_vl.models.student import Student
from gkl_vl.objectives.clip import ClipKd, ClipKdWeights
from gkl_vl.teachers.bank import Bank
from gkl_vl.teachers.online import online_teacher, teacher_scales
from gkl_vl.training.gradient_cache import backward_from_cache, embed_all

WEIGHTS = ClipKdWeights(
    contrastive_weight=1.0,
    mimicry_weight=7.0,
    gkl=GklSettings(soft_ce_weight=2.0, wmse_weight=0.3, gamma=0.5, temperature=2.0, weight_temperature=3.0),
    cross=GklSettings(soft_ce_weight=0.0, wmse_weight=0.0),
)
SIDES = ("image", "text")
CAPTIONS = ["red car", "a very long flag", "red car"]


@pytest.fixture(scope="module")
def student_config(tmp_path_factory) -> str:
    """The bundled student with embeddings of another length than the teacher's."""
    config = json.loads((MODEL_CONFIGS / "emoji-student.json").read_text())
    path = tmp_path_factory.mktemp("student") / "narrow.json"
    path.write_text(json.dumps(config | {"embed_dim": 128}))
    return str(path)


@pytest.fixture(scope="module")
def student(student_config) -> Clip:
    torch.manual_seed(0)
    return load_clip(student_config)


@pytest.fixture(scope="module")
def teacher() -> Clip:
    """Another architecture, another image size, other mean and std."""
    torch.manual_seed(1)
    clip = load_clip("emoji-teacher")
    preprocess = PreprocessCfg(size=96, mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7))
    return freeze(dataclasses.replace(clip, preprocess=preprocess))


@pytest.fixture
def batch(student, teacher) -> dict:
    draw = torch.Generator().manual_seed(2)
    return {
        "image": torch.randint(0, 256, (3, 3, 96, 96), generator=draw, dtype=torch.uint8),
        "text": student.tokenize(CAPTIONS),
        # both models have the same tokenizer: other texts, to detect tokens that reach the wrong model
        "teacher_text": teacher.tokenize([f"drawing of a {caption}" for caption in CAPTIONS]),
        "text_ids": torch.tensor([5, 6, 5]),
    }


def model_for(student: Clip, teacher_dim: int | None) -> Student:
    torch.manual_seed(3)
    dims = [] if teacher_dim is None else [teacher_dim]
    return Student(student.towers, embed_dim=student.embed_dim, teacher_dims=dims, mapped=SIDES).eval()


def clip_kd(model, batch, *, student, teacher, weights):
    objective = ClipKd(student=student, teacher=teacher, weights=weights, bank=Bank(0))
    return objective.loss(objective.outputs(model, batch), objective.targets(batch))


def test_the_objective_is_the_sum_of_its_terms(student, teacher, batch):
    model = model_for(student, teacher.embed_dim)
    loss, scalars = clip_kd(model, batch, student=student, teacher=online_teacher(teacher), weights=WEIGHTS)
    output = model(student.prepare(batch["image"]), batch["text"])
    with torch.no_grad():
        teacher_image = teacher.towers.encode_image(teacher.prepare(batch["image"]))
        teacher_text = teacher.towers.encode_text(batch["teacher_text"])
    logits, terms = image_text_loss(
        image=output["image"],
        text=output["text"],
        logit_scale=output["logit_scale"],
        teacher_image=teacher_image,
        teacher_text=teacher_text,
        teacher_logit_scale=teacher.towers.log_scale().exp(),
        text_ids=batch["text_ids"],
        contrastive_weight=1.0,
        soft_ce_weight=2.0,
        wmse_weight=0.3,
        gamma=0.5,
        temperature=2.0,
        weight_temperature=3.0,
    )
    mimicry = mimicry_loss(
        image=output["mapped_image"],
        text=output["mapped_text"],
        teacher_image=teacher_image,
        teacher_text=teacher_text,
    )
    assert loss.item() == pytest.approx((logits + 7 * mimicry).item(), rel=1e-6)
    assert scalars["mimicry"].item() == pytest.approx(mimicry.item(), rel=1e-6)
    assert {k: scalars[k].item() for k in terms} == pytest.approx({k: v.item() for k, v in terms.items()}, rel=1e-5)


def test_the_teacher_has_no_gradient_and_a_step_does_not_change_it(student, teacher, batch):
    before = {name: tensor.clone() for name, tensor in teacher.towers.state_dict().items()}
    model = model_for(student, teacher.embed_dim)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss, _ = clip_kd(model, batch, student=student, teacher=online_teacher(teacher), weights=WEIGHTS)
    loss.backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in teacher.towers.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.towers.state_dict().items())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_with_a_bias_is_a_siglip(student_config, student, teacher, batch):
    biased = load_clip(student_config)
    biased.towers.model.logit_bias = torch.nn.Parameter(torch.tensor(-4.0))
    scales = teacher_scales(biased)
    assert scales["teacher_logit_bias"] == -4 and not scales["teacher_logit_bias"].requires_grad
    assert set(teacher_scales(teacher)) == {"teacher_logit_scale"}
    siglip_teacher = freeze(load_clip("emoji-teacher"))
    siglip_teacher.towers.model.logit_bias = torch.nn.Parameter(torch.tensor(-2.0), requires_grad=False)
    for trained, frozen in ((biased, teacher), (biased, siglip_teacher), (student, siglip_teacher)):
        model = model_for(trained, frozen.embed_dim)
        loss, scalars = clip_kd(model, batch, student=trained, teacher=online_teacher(frozen), weights=WEIGHTS)
        output, targets = model(trained.prepare(batch["image"]), batch["text"]), online_teacher(frozen)(batch)
        forms = {"sigmoid": trained is biased, "teacher_sigmoid": trained is biased and frozen is siglip_teacher}
        logits, _ = image_text_loss(
            **{name: tensor for name, tensor in output.items() if not name.startswith("mapped")},
            **targets,
            text_ids=batch["text_ids"],
            contrastive_weight=WEIGHTS.contrastive_weight,
            **vars(WEIGHTS.gkl),
            **forms,
        )
        assert loss.item() == pytest.approx((logits + 7 * scalars["mimicry"]).item(), rel=1e-5)
        loss.backward()
        if trained is biased:
            assert biased.towers.model.logit_bias.grad.abs() > 1e-3


@pytest.fixture
def captions(student, teacher, batch) -> dict:
    """The batch with two captions for each image."""
    others = ["dog", "a house with a red roof", "two dogs"]
    text = student.tokenize([*CAPTIONS, *others]).view(2, 3, -1)
    teacher_text = teacher.tokenize([f"drawing of a {caption}" for caption in (*CAPTIONS, *others)]).view(2, 3, -1)
    ids = torch.tensor([[5, 7], [6, 8], [5, 9]])
    return batch | {"text": text.transpose(0, 1), "teacher_text": teacher_text.transpose(0, 1), "text_ids": ids}


def test_all_captions_of_an_image_are_its_positives(student, teacher, captions):
    teach, model = online_teacher(teacher), model_for(student, teacher.embed_dim)
    _, scalars = clip_kd(model, captions, student=student, teacher=teach, weights=WEIGHTS)
    outputs = model(student.prepare(captions["image"]), captions["text"])
    s = (outputs["logit_scale"] * outputs["image"] @ outputs["text"].flatten(0, 1).T).double()
    own = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1]]).double()  # ids 5 7, 6 8, 5 9
    rows, columns = own / own.sum(1, keepdim=True), own / own.sum(0)
    naive = -(rows * s.log_softmax(1)).sum() / 3 / 2 - (columns * s.log_softmax(0)).sum() / 6 / 2
    assert scalars["contrastive"].item() == pytest.approx(naive.item(), rel=1e-5)
    _, alone = clip_kd(model, captions, student=student, teacher=None, weights=WEIGHTS)
    assert alone["contrastive"].item() == pytest.approx(naive.item(), rel=1e-5) and "soft_ce" not in alone


def test_cross_logits_of_several_captions_have_the_first_ones_as_columns(student, teacher, captions):
    """All captions are rows."""
    weights = dataclasses.replace(WEIGHTS, cross=GklSettings(soft_ce_weight=2.0, wmse_weight=0.5, gamma=0.5))
    model, targets = model_for(student, teacher.embed_dim), online_teacher(teacher)(captions)
    _, scalars = clip_kd(model, captions, student=student, teacher=online_teacher(teacher), weights=weights)
    outputs = model(student.prepare(captions["image"]), captions["text"])
    _, want = cross_logits_loss(
        image=outputs["mapped_image"],
        text=torch.cat([outputs["mapped_text"][:, k] for k in range(2)]),
        teacher_image=targets["teacher_image"],
        teacher_text=torch.cat([targets["teacher_text"][:, k] for k in range(2)]),
        text_bank=targets["teacher_text"][:, 0],
        image_bank=targets["teacher_image"],
        teacher_logit_scale=targets["teacher_logit_scale"],
        **vars(weights.cross),
    )
    for name in ("cross_soft_ce", "cross_wmse"):
        assert scalars[name].item() == pytest.approx(want[name].item(), rel=1e-5)


@pytest.mark.parametrize("sizes", [[2, 1], [1, 1, 1]])
def test_several_captions_in_micro_batches(student, teacher, captions, sizes):
    weights = dataclasses.replace(WEIGHTS, cross=GklSettings(soft_ce_weight=2.0, wmse_weight=0.5, gamma=0.5))
    captions |= {"keys": ["a", "b", "c"]}
    gradients = []
    for parts in ([3], sizes):
        starts = [sum(parts[:k]) for k in range(len(parts))]
        batches = [{k: v[a : a + n] for k, v in captions.items()} for a, n in zip(starts, parts, strict=True)]
        model, accelerator = model_for(student, teacher.embed_dim), Accelerator(cpu=True)
        model.zero_grad()
        objective = ClipKd(student=student, teacher=online_teacher(teacher), weights=weights, bank=Bank(0))
        cached = embed_all(accelerator, model, objective, batches)
        objective.loss(cached.outputs, cached.targets)[0].backward()
        backward_from_cache(accelerator, model, objective, batches, cached)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, want in gradients[0].items():
        assert torch.allclose(gradients[1][name], want, rtol=1e-3, atol=1e-5 * want.abs().max().item()), name


def test_without_a_teacher_the_loss_is_the_contrastive_one(student, batch):
    model = model_for(student, None)
    loss, scalars = clip_kd(model, batch, student=student, teacher=None, weights=WEIGHTS)
    output = model(student.prepare(batch["image"]), batch["text"])
    plain, _ = image_text_loss(
        image=output["image"], text=output["text"], logit_scale=output["logit_scale"], text_ids=batch["text_ids"]
    )
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert not {"soft_ce", "wmse", "mimicry"} & set(scalars)


def test_mimicry_alone_is_the_weighted_mimicry_loss(student, teacher, batch):
    alone = dataclasses.replace(WEIGHTS, contrastive_weight=0.0, gkl=GklSettings(soft_ce_weight=0.0, wmse_weight=0.0))
    model = model_for(student, teacher.embed_dim)
    loss, scalars = clip_kd(model, batch, student=student, teacher=online_teacher(teacher), weights=alone)
    loss.backward()
    assert loss.item() == pytest.approx(7 * scalars["mimicry"].item()) and loss.item() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())  # also that of the scale, for DDP


def test_the_maps_exist_only_where_dimensions_differ(student, teacher):
    assert student.embed_dim != teacher.embed_dim
    extra = {name for name, _ in model_for(student, teacher.embed_dim).named_parameters()} - {
        name for name, _ in model_for(student, None).named_parameters()
    }
    assert extra == {"image_map.weight", "text_map.weight"}
    assert not list(model_for(student, student.embed_dim).image_map.parameters())
