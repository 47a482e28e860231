"""Robust CLIP students: the attack in training, the recipe, and accuracy under attack."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import accelerate
import pytest
import test_eval_scripts
import test_recipes
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import run_ranks, run_script_in_ranks
from open_clip.transform import PreprocessCfg
from PIL import Image
from safetensors.torch import load_file
from small_sets import write_set
from torch import Tensor, nn

from gkl_vl.errors import UserError
from gkl_vl.evaluation.benchmark import measure, metrics_of
from gkl_vl.evaluation.embed import Embedder
from gkl_vl.evaluation.sets import load_benchmark_set
from gkl_vl.losses.gkl import GklSettings
from gkl_vl.losses.image_text import image_text_loss, mimicry_loss
from gkl_vl.models.clip import Clip, load_clip, resize
from gkl_vl.models.student import Student
from gkl_vl.models.towers import TEXT_PARTS, OpenClipTowers
from gkl_vl.objectives.clip import ClipKd, ClipKdWeights, ImageAttack, image_attack
from gkl_vl.robustness import pgd, zero_shot
from gkl_vl.robustness.results import wilson_interval
from gkl_vl.robustness.zero_shot import ZeroShot, _zero_shot_examples, attack_zero_shot
from gkl_vl.teachers.bank import Bank
from gkl_vl.training.checkpoint import RunFolder
from gkl_vl.training.engine import FitConfig, fit
from gkl_vl.training.optim import adamw

pytestmark = pytest.mark.usefixtures("one_thread")
N, WIDTH = 6, 20
WEIGHTS = ClipKdWeights(
    contrastive_weight=1.0,
    mimicry_weight=7.0,
    gkl=GklSettings(soft_ce_weight=2.0, wmse_weight=0.3, gamma=0.5, temperature=2.0, weight_temperature=3.0),
    cross=GklSettings(soft_ce_weight=0.0, wmse_weight=0.0),
)
ATTACK = image_attack("linf", 4 / 255)
TEXT = {"context_length": 24, "vocab_size": 4096, "hf_tokenizer_name": "gkl-vl/clip-bpe-4096"}
TEXT |= {"width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
RESNET = {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, str]:
    """Student configurations without and with BatchNorm."""
    folder = tmp_path_factory.mktemp("students")
    for name, vision in (("vit", VIT), ("resnet", RESNET)):
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
        (folder / f"robust-{name}.json").write_text(json.dumps(config))
    return {name: str(folder / f"robust-{name}.json") for name in ("vit", "resnet")}


def student_of(config: str, bias: float | None = None) -> Clip:
    torch.manual_seed(0)
    clip = load_clip(config)
    if bias is not None:
        clip.towers.model.logit_bias = nn.Parameter(torch.tensor(bias))
    return replace(clip, preprocess=PreprocessCfg(size=32, mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7)))


def model_of(clip: Clip) -> Student:
    torch.manual_seed(1)
    return Student(clip.towers, embed_dim=16, teacher_dims=[WIDTH], mapped=("image", "text"))


def batch_of(clip: Clip, seed: int = 2) -> dict:
    """Views of another size than the student's, and the teacher's embeddings of each pair."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (N, 3, 40, 40), generator=draw, dtype=torch.uint8),
        "text": clip.tokenize(["red car", "a flag", "red car", "two cats", "a very long train", "moon"]),
        "text_ids": torch.tensor([5, 6, 5, 7, 8, 9]),
        "teacher": F.normalize(torch.randn(N, 2, WIDTH, generator=draw), dim=-1),
        "keys": [str(i) for i in range(N)],
    }


class Teacher:
    """Returns the embeddings in the batch; records the images that it gets."""

    def __init__(self, bias: float | None = None):
        self.images: list[Tensor] = []
        self.bias = {} if bias is None else {"teacher_logit_bias": torch.tensor(bias)}

    def __call__(self, batch: dict) -> dict[str, Tensor]:
        self.images.append(batch["image"].clone())
        image, text = batch["teacher"].unbind(dim=1)
        return {"teacher_image": image, "teacher_text": text, "teacher_logit_scale": torch.tensor(11.0)} | self.bias


def objective_of(clip: Clip, attack: ImageAttack | None = ATTACK, teacher: Teacher | None = None) -> ClipKd:
    return ClipKd(student=clip, teacher=teacher or Teacher(), weights=WEIGHTS, bank=Bank(0), attack=attack)


# ---- the attack --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm, epsilon", [("linf", 4 / 255), ("linf", 0.4), ("l2", 0.5)])
def test_attacked_pixels_stay_within_the_radius_and_in_range(configs, norm, epsilon):
    clip = student_of(configs["vit"])
    batch = batch_of(clip)
    attacked = objective_of(clip, image_attack(norm, epsilon)).prepare(batch)["attacked"]
    moved = attacked - clip.scaled(batch["image"])
    length = moved.abs().amax() if norm == "linf" else moved.flatten(1).norm(dim=1).amax()
    assert attacked.shape == (N, 3, 32, 32) and 0 <= attacked.min() and attacked.max() <= 1
    assert 0.9 * epsilon < length <= epsilon


def distance(clip: Clip, pixels: Tensor, batch: dict, teacher: Teacher) -> float:
    """The loss that the attack maximises, in evaluation mode."""
    image = clip.towers.eval().encode_image(clip.normalised(pixels))
    return soft_cross_entropy(clip, image, batch, teacher).item()


def soft_cross_entropy(clip: Clip, image: Tensor, batch: dict, teacher: Teacher) -> Tensor:
    """Soft cross entropy with T = 2: the mean of both directions; of a SigLIP the sum over pairs."""
    text, targets, bias = clip.towers.encode_text(batch["text"]), teacher(batch), clip.towers.bias()
    ours = clip.towers.log_scale().exp() * image @ text.T
    theirs = targets["teacher_logit_scale"] * targets["teacher_image"] @ targets["teacher_text"].T
    softmaxes = [(theirs / 2).softmax(1), (theirs.T / 2).softmax(1)]
    if bias is None:
        return -sum((p * (s / 2).log_softmax(1)).sum() for p, s in zip(softmaxes, (ours, ours.T), strict=True)) / N / 2
    p = (softmaxes[0] + softmaxes[1].T) / 2
    if "teacher_logit_bias" in targets:
        p = ((theirs + targets["teacher_logit_bias"]) / 2).sigmoid()
    return F.binary_cross_entropy_with_logits((ours + bias) / 2, p.to(ours), reduction="sum") / N


def test_the_attack_increases_the_distance_to_the_teacher(configs):
    clip = student_of(configs["vit"])
    batch, teacher = batch_of(clip), Teacher()
    clean = clip.scaled(batch["image"])
    attacked = objective_of(clip).prepare(batch)["attacked"]
    noise = (clean + 4 / 255 * torch.randn(clean.shape).sign()).clamp(0, 1)
    before, with_noise, after = (distance(clip, pixels, batch, teacher) for pixels in (clean, noise, attacked))
    assert after - before > 10 * abs(with_noise - before)


@pytest.mark.parametrize(
    "norm, bias, teacher_bias", [("linf", None, None), ("l2", None, None), ("linf", -4.0, None), ("linf", -4.0, -2.0)]
)
def test_the_attack_equals_the_procedure_written_out(configs, norm, bias, teacher_bias, monkeypatch):
    """TRADES's start, three steps of two thirds of the radius, on the soft cross entropy of both directions."""
    monkeypatch.setattr(Clip, "scaled", scaled_in_double)
    clip, epsilon = student_of(configs["resnet"], bias), 0.1
    clip.towers.double()
    batch, teacher = batch_of(clip), Teacher(teacher_bias)
    torch.manual_seed(4)
    attacked = objective_of(clip, image_attack(norm, epsilon), teacher).prepare(batch)["attacked"]
    clip.towers.eval()
    torch.manual_seed(4)
    clean = clip.scaled(batch["image"])

    def project(x: Tensor) -> Tensor:
        if norm == "linf":
            return (clean + (x - clean).clamp(-epsilon, epsilon)).clamp(0, 1)
        return (clean + (x - clean).renorm(2, 0, epsilon)).clamp(0, 1)

    x = project(clean + 0.001 * torch.randn(clean.shape, dtype=torch.float64))
    for _ in range(3):
        x.requires_grad_()
        image = clip.towers.encode_image(clip.normalised(x))
        (g,) = torch.autograd.grad(soft_cross_entropy(clip, image, batch, teacher), x)
        direction = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x = project(x.detach() + 2 * epsilon / 3 * direction)
    torch.testing.assert_close(attacked, x, rtol=0, atol=1e-6)


def test_every_setting_changes_the_attack(configs):
    clip = student_of(configs["vit"])
    batch = batch_of(clip)

    def attacked(attack: ImageAttack, teacher: Teacher | None = None) -> Tensor:
        torch.manual_seed(4)
        return objective_of(clip, attack, teacher).prepare(batch)["attacked"]

    base = attacked(ATTACK)
    assert torch.equal(base, attacked(ATTACK))
    for change in ({"steps": 2}, {"step_size": 0.001}, {"epsilon": 0.02}, {"norm": "l2"}, {"wmse_weight": 9.0}):
        assert not torch.equal(base, attacked(replace(ATTACK, **change))), change
    wmse_alone = attacked(replace(ATTACK, soft_ce_weight=0.0, wmse_weight=1.0))
    assert not torch.equal(base, wmse_alone)
    torch.manual_seed(4)
    without_teacher = ClipKd(student=clip, teacher=None, weights=WEIGHTS, bank=Bank(0), attack=ATTACK).prepare(batch)[
        "attacked"
    ]
    assert not torch.equal(base, without_teacher)


def test_without_a_teacher_the_contrastive_loss_is_maximised(configs):
    clip = student_of(configs["vit"])
    batch = batch_of(clip)
    objective = ClipKd(student=clip, teacher=None, weights=WEIGHTS, bank=Bank(0), attack=ATTACK)
    losses = []
    for pixels in (clip.scaled(batch["image"]), objective.prepare(batch)["attacked"]):
        image, text = clip.towers.encode_image(clip.normalised(pixels)), clip.towers.encode_text(batch["text"])
        scale = clip.towers.log_scale().exp()
        losses.append(image_text_loss(image=image, text=text, logit_scale=scale, text_ids=batch["text_ids"])[0].item())
    assert losses[1] > losses[0] + 1e-3


def test_the_attack_does_not_change_the_student(configs):
    clip = student_of(configs["resnet"])
    model = model_of(clip).train()
    clip.towers.model.visual.trunk.layer1.eval()  # a frozen part
    modes = {name: module.training for name, module in model.named_modules()}
    seen: list[bool] = []
    for part in (clip.towers.model.visual, clip.towers.model.transformer):
        part.register_forward_hook(lambda module, *_: seen.append(module.training))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objective_of(clip).prepare(batch_of(clip))
    assert seen == [False] * (TEXT_PARTS + 3)  # the captions once, in parts, and the images in three steps
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert any("running_mean" in name for name in before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


# ---- what is trained on ------------------------------------------------------------------------------------------


def test_the_student_gets_attacked_images_and_the_teacher_clean_ones(configs):
    clip, teacher = student_of(configs["vit"]), Teacher()
    model, objective, batch = model_of(clip), objective_of(clip, teacher=teacher), batch_of(clip)
    prepared = objective.prepare(batch)
    loss, _ = objective.loss(objective.outputs(model, prepared), objective.targets(prepared))
    assert len(teacher.images) == 1 and torch.equal(teacher.images[0], batch["image"])
    output, targets = model(clip.normalised(prepared["attacked"]), batch["text"]), Teacher()(batch)
    logits, _ = image_text_loss(
        **{name: tensor for name, tensor in output.items() if not name.startswith("mapped_")},
        **targets,
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
        teacher_image=targets["teacher_image"],
        teacher_text=targets["teacher_text"],
    )
    assert loss.item() == pytest.approx((logits + 7 * mimicry).item(), rel=1e-6)
    clean = objective.loss(model(clip.prepare(batch["image"]), batch["text"]), objective.targets(batch))[0]
    assert loss.item() > clean.item()


def test_without_an_attack_nothing_changes(configs):
    clip, batch = student_of(configs["vit"]), batch_of(student_of(configs["vit"]))
    model, objective = model_of(clip), objective_of(clip, attack=None)
    state = torch.get_rng_state()
    assert objective.prepare(batch) is batch and torch.equal(torch.get_rng_state(), state)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.2, 0.3, 0.4), (0.5, 0.6, 0.7)))
    by_hand = (resize(batch["image"], 32) - mean) / std
    assert torch.equal(clip.prepare(batch["image"]), by_hand)
    output = objective.outputs(model, batch)
    assert all(torch.equal(output[name], tensor) for name, tensor in model(by_hand, batch["text"]).items())


class Loader:
    def __init__(self, batches: list[dict]):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def position(self):
        return {}

    def num_skipped(self):
        return 0


def test_each_batch_of_an_update_is_attacked_once(configs, tmp_path):
    clip, teacher = student_of(configs["resnet"]), Teacher()
    objective, batches = objective_of(clip, teacher=teacher), [batch_of(clip, seed) for seed in range(4)]
    model = model_of(clip)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(
        accelerator=Accelerator(cpu=True, mixed_precision="bf16"),
        model=model,
        objective=objective,
        make_optimizer=lambda module: adamw(module, lr=1e-3, wd=0.1),
        learning_rate=lambda step: 1e-3,
        make_loader=lambda position: Loader(batches),
        run=RunFolder(tmp_path / "run", is_main=True),
        config=FitConfig(steps=2, accum_steps=2),
        evaluate=lambda model: [],
    )
    assert len(teacher.images) == 4  # two batches in each of two updates
    assert all(torch.equal(seen, batch["image"]) for seen, batch in zip(teacher.images, batches, strict=True))
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(changed) > 20


# ---- several processes -------------------------------------------------------------------------------------------


def waves(images: Tensor, *_) -> Tensor:
    """A start of the attack that depends on the image, not on the process."""
    return 0.001 * torch.sin(1000 * images)


def scaled_in_double(clip: Clip, images: Tensor) -> Tensor:
    """In float32 a gradient near 0 rounds to either sign, and the attack takes another path."""
    return resize(images, clip.image_size).double()


CASES = [(None, None), (-4.0, None), (-4.0, -2.0)]
"""Biases of student and teacher; a model with a bias is a SigLIP."""


def of_rank(rank: int, world_size: int, config: str) -> list[tuple[float, Tensor, Tensor]]:
    pgd._noise, Clip.scaled = waves, scaled_in_double
    return [shares(rank, world_size, config, *case) for case in CASES]


def shares(
    rank: int, world_size: int, config: str, bias: float | None, teacher_bias: float | None
) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient and attacked images of this rank's rows."""
    clip = student_of(config, bias)
    model, objective = model_of(clip).double(), objective_of(clip, teacher=Teacher(teacher_bias))
    rows = slice(rank * N // world_size, (rank + 1) * N // world_size)
    batch = {name: value[rows] for name, value in batch_of(clip).items()}
    batch["teacher"] = batch["teacher"].double()
    prepared = objective.prepare(batch)
    loss, _ = objective.loss(objective.outputs(model, prepared), objective.targets(prepared))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]), prepared["attacked"]


def test_processes_with_different_data_give_the_joined_batch(configs, monkeypatch):
    monkeypatch.setattr(pgd, "_noise", waves)
    monkeypatch.setattr(Clip, "scaled", scaled_in_double)
    by_case = zip(*run_ranks(of_rank, 2, configs["vit"]), strict=True)
    for case, results in zip(CASES, by_case, strict=True):
        loss, gradient, attacked = shares(0, 1, configs["vit"], *case)
        torch.testing.assert_close(torch.cat([result[2] for result in results]), attacked, rtol=0, atol=1e-9)
        assert [result[0] for result in results] == pytest.approx([loss] * 2, rel=1e-6)
        torch.testing.assert_close((results[0][1] + results[1][1]) / 2, gradient, rtol=1e-4, atol=1e-6)


# ---- the recipe --------------------------------------------------------------------------------------------------

place = test_recipes.place  # the fixtures
call = test_recipes.call
RECIPE = "clip_robust"
FLAGS = ["--batch-size", "4", "--workers", "0", "--captions-per-image", "2", "--norm"]


def flags_of(place: Path, configs: dict[str, str], *more: str) -> list[str]:
    own = ["--teacher", f"local-dir:{place}/teacher", "--student", configs["vit"]]
    return [*own, "--train-data", f"{place}/pairs.tar::{place}/pairs.tar", *FLAGS, *more]


def test_two_processes_train_a_robust_student(place, configs):
    flags = flags_of(place, configs, "linf", "--steps", "2", "--output-dir", "robust")
    out = run_script_in_ranks(test_recipes.HOUSE / "recipes" / f"{RECIPE}.py", *flags, folder=place)
    assert " · against linf 4/255 · 2 steps of 4 · seed 0 · 2 x cpu" in out
    card = (place / "robust" / "model" / "README.md").read_text()
    assert ", against attacks on its images within `4/255` in linf, with gkl-vl" in card


def test_a_stopped_robust_run_goes_on_bit_for_bit(place, configs, call, tmp_path):
    """The noise of the attack is drawn from the generator that the checkpoint holds."""
    flags = flags_of(place, configs, "l2", "--epsilon", "0.3", "--steps", "4", "--checkpoint-every-steps", "2")
    flags += ["--precision", "bf16", "--accum-steps", "2"]
    code, out, told = call(*flags, "--output-dir", tmp_path / "whole", recipe=RECIPE)
    assert (code, told) == (0, "") and " · against l2 0.3 · 4 steps of 8 " in out
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step_00000004")
    torch.manual_seed(99)
    code, _, told = call(*flags, "--output-dir", tmp_path / "stopped", "--resume", "latest", recipe=RECIPE)
    assert (code, told) == (0, "")
    ends = [
        load_file(tmp_path / name / "checkpoints" / "step_00000004" / "model.safetensors")
        for name in ("whole", "stopped")
    ]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_a_student_in_shards_is_refused(place, configs, call, monkeypatch):
    monkeypatch.setattr(accelerate.Accelerator, "is_fsdp2", property(lambda self: True))
    code, _, told = call(*flags_of(place, configs, "linf", "--steps", "1"), recipe=RECIPE)
    assert code == 2 and "FSDP keeps a model in shards, and attacks need it whole" in told and told.count("\n") == 1


@pytest.mark.parametrize("epsilon, message", [("8", "an epsilon of 8 is no radius in linf"), ("x", "is no number")])
def test_a_wrong_radius_is_one_line_and_code_2(place, configs, call, epsilon, message):
    code, _, error = call(*flags_of(place, configs, "linf", "--epsilon", epsilon), recipe=RECIPE)
    assert code == 2 and message in error and error.count("\n") == 1
    assert not Path("runs").exists()  # a run that never started leaves no folder


# ---- accuracy under attack ---------------------------------------------------------------------------------------


class Brightest(nn.Module):
    """A CLIP that embeds an image as the means of its channels, and the texts red, green and blue as unit vectors."""

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = None
        self.norm = nn.BatchNorm2d(3, affine=False)

    def encode_image(self, pixels: Tensor, normalize: bool) -> Tensor:
        return F.normalize(self.norm(pixels).mean(dim=(2, 3)), dim=-1)

    def encode_text(self, tokens: Tensor, normalize: bool) -> Tensor:
        return F.one_hot(tokens[:, 0], 3).float()


@pytest.fixture
def brightest() -> Clip:
    return brightest_clip()


def brightest_clip() -> Clip:
    def tokenize(texts: list[str]) -> Tensor:
        return torch.tensor([[["red", "green", "blue"].index(text.split()[-1])] for text in texts])

    preprocess = PreprocessCfg(size=8, mean=(0.1, 0.1, 0.1), std=(0.5, 0.5, 0.5))
    return Clip("brightest", OpenClipTowers(Brightest()), preprocess, tokenize, None, {"embed_dim": 3})


@pytest.fixture
def shades(tmp_path):
    """Ten images: the labelled channel is 10, 20, ... 100 levels brighter than the others; the last label is wrong."""
    samples = []
    for number in range(10):
        levels = [100, 100, 100]
        levels[number % 3] += 10 * (number + 1)
        path = tmp_path / "shade.png"
        Image.new("RGB", (8, 8), tuple(levels)).save(path)
        label = (number + (number == 9)) % 3
        samples.append((f"s{number}", {"png": path.read_bytes(), "cls": str(label).encode()}))
    folder = write_set(
        tmp_path / "shades",
        [samples[:4], samples[4:]],
        classnames=["red", "green", "blue"],
        zeroshot_classification_templates=["{c}", "something {c}"],
    )
    return load_benchmark_set(str(folder))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_accuracy_under_attack_equals_the_exact_one(brightest, shades, norm):
    """A channel changes by at most epsilon: a lead above 2 epsilon remains. In l2: above sqrt(2) epsilon / 8 pixels."""
    lead = 47 / 255  # leads of 50 to 90 levels remain
    epsilon = lead / 2 if norm == "linf" else lead * 8 / 2**0.5
    brightest.towers.train()
    state = torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in brightest.towers.state_dict().items()}
    metrics, _ = attack_zero_shot(
        embedder=Embedder(clip=brightest, batch_size=4), dataset=shades, norm=norm, epsilon=epsilon, images=500
    )
    low, high = wilson_interval(hits=5, n=10)
    assert metrics == {
        f"apgd_{norm}_acc1": 0.5,
        f"apgd_{norm}_acc1_low": low,
        f"apgd_{norm}_acc1_high": high,
        f"apgd_{norm}_clean_acc1": 0.9,
        f"apgd_{norm}_epsilon": epsilon,
        f"apgd_{norm}_n": 10.0,
    }
    assert brightest.towers.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in brightest.towers.state_dict().items())
    assert all(parameter.grad is None for parameter in brightest.towers.parameters())


def test_a_tiny_radius_keeps_the_accuracy_and_a_large_one_gives_0(brightest, shades):
    embedder = Embedder(clip=brightest)
    clean = metrics_of(measure(embedder, shades))["acc1"]
    for epsilon, expected in ((1e-6, clean), (0.5, 0.0)):
        metrics, _ = attack_zero_shot(embedder=embedder, dataset=shades, norm="linf", epsilon=epsilon, images=10)
        assert (metrics["apgd_linf_clean_acc1"], metrics["apgd_linf_acc1"]) == (clean, expected)


class Terminal(io.StringIO):
    """A stderr on which bars are shown."""

    def isatty(self) -> bool:
        return True


def attack_in_ranks(rank: int, world_size: int, folder: str) -> tuple[dict[str, float], list[str], list[int], str]:
    """Metrics, warnings, first image of each batch that this process attacked, its stderr. Each batch has warnings."""
    attacked, terminal, original = [], Terminal(), zero_shot.attack_batch

    def attack_batch(attack, target, examples, index, device):
        attacked.append(int(index[0]))
        result = original(attack, target, examples, index, device)
        own = {0: "in the first", 4: "in the second", 8: "in the third"}[int(index[0])]
        return result | {"warnings": [f"batch at {index[0]}", own]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setattr(zero_shot, "attack_batch", attack_batch)
        metrics, warnings = attack_zero_shot(
            embedder=Embedder(clip=brightest_clip(), batch_size=4),
            dataset=load_benchmark_set(folder),
            norm="linf",
            epsilon=0.5 * 47 / 255,
            images=10,
        )
    return metrics, warnings, attacked, terminal.getvalue()


def test_processes_share_the_batches_and_return_the_same_numbers(shades, tmp_path):
    folder = str(tmp_path / "shades")
    metrics, warnings, attacked, stderr = attack_in_ranks(0, 1, folder)
    assert attacked == [0, 4, 8] and "| 0/3 [" in stderr
    assert metrics["apgd_linf_acc1"] == 0.5 and metrics["apgd_linf_clean_acc1"] == 0.9
    once = [f"AutoAttack, 1 of 3 batches: in the {number}" for number in ("first", "second", "third")]
    assert warnings == ["AutoAttack, 3 of 3 batches: batch at 0", *once]
    first, second = run_ranks(attack_in_ranks, 2, folder)
    assert first[:2] == second[:2] == (metrics, warnings)
    assert first[2] == [0, 8] and second[2] == [4]  # batches 0 and 2, batch 1
    assert "| 0/2 [" in first[3] and second[3] == ""  # the bar of rank 0 alone


def test_logits_are_scaled_similarities(configs):
    clip = student_of(configs["vit"])
    pixels, weights = clip.scaled(batch_of(clip)["image"]), F.normalize(torch.randn(3, 16), dim=1)
    similarity = clip.towers.encode_image(clip.normalised(pixels)) @ weights.T
    torch.testing.assert_close(ZeroShot(clip, weights)(pixels), similarity / 0.07)  # CLIP's first scale


def test_a_part_of_the_images_is_evenly_spaced(brightest, shades):
    part = _zero_shot_examples(brightest, shades, 4)
    assert part.labels.tolist() == [number % 3 for number in (0, 2, 5, 7)]
    leads = part.images.float().mean(dim=(2, 3)).amax(dim=1) - 100
    assert leads.tolist() == [10, 30, 60, 80]  # the pixels themselves, not normalised
    with pytest.raises(UserError, match="--attack-images 0 must be at least 1"):
        _zero_shot_examples(brightest, shades, 0)


def test_pixels_are_those_of_the_evaluation(configs):
    clip = student_of(configs["vit"])
    image = Image.fromarray(batch_of(clip)["image"][0].permute(1, 2, 0).numpy())
    exact = (clip.scaled_transform()(image) * 255).round().byte()[None]
    assert torch.equal(clip.normalised(exact.float() / 255)[0], clip.image_transform()(image))


# ---- the script --------------------------------------------------------------------------------------------------

model = test_eval_scripts.model  # the fixtures
colours = test_eval_scripts.colours


@pytest.fixture
def evaluate(tmp_path, monkeypatch, run_script):
    """evaluate(*flags) -> (exit code, stdout, stderr) of zero_shot.py."""
    calling = test_eval_scripts.call.__wrapped__(tmp_path, monkeypatch, run_script)
    return lambda *flags: calling("zero_shot", *flags)


def test_the_script_adds_accuracy_under_attack(evaluate, model, colours):
    flags = ["--model", model, "--dataset", str(colours)]
    assert evaluate(*flags)[0] == 0
    attacked = [*flags, "--attack", "apgd", "--epsilon", "2/255", "--attack-images", "3"]
    code, out, _ = evaluate(*attacked)
    assert code == 0 and "under APGD, linf 2/255, 3 images" in out and "an upper bound" in out
    assert evaluate(*attacked)[0] == 0
    plain, first, again = [json.loads(line)["metrics"] for line in Path("result.json").read_text().splitlines()]
    assert first == again
    added = {"acc1", "acc1_low", "acc1_high", "clean_acc1", "epsilon", "n"}
    assert set(first) - set(plain) == {f"apgd_linf_{name}" for name in added}
    assert all(first[name] == value for name, value in plain.items() if value == value)
    assert first["apgd_linf_epsilon"] == 2 / 255 and first["apgd_linf_n"] == 3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--attack", "apgd", "--epsilon", "8"], "an epsilon of 8 is no radius in linf"),
        (["--attack", "apgd", "--epsilon", "four"], "an epsilon of 'four' is no number"),
        (["--epsilon", "4/255"], "--epsilon 4/255 is the radius of an attack: add --attack apgd"),
        (["--attack", "apgd", "--attack-images", "0"], "--attack-images 0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(evaluate, model, colours, flags, message):
    code, out, error = evaluate("--model", model, "--dataset", str(colours), *flags)
    assert (code, out) == (2, "") and message in error and error.count("\n") == 1
    assert not Path("result.json").exists()


def test_without_pyautoattack_the_line_says_what_to_install(evaluate, colours, monkeypatch):
    """The check comes before the model is loaded."""
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    code, _, error = evaluate("--model", "local-dir:nowhere", "--dataset", str(colours), "--attack", "apgd")
    assert code == 2 and "pip install 'gkl-vl[attack]'" in error and error.count("\n") == 1
