"""A flag means what it says: each number has bounds, and a value that is out of them, or that the run would not use, is
refused in one line before anything is written."""

import importlib.util
import os
import sys
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from gkl_vl import cli
from gkl_vl.errors import UserError
from gkl_vl.training import run as run_module
from gkl_vl.training.label_kd import LabelConfig

HOUSE = Path(__file__).parents[1]
SCRIPTS = sorted(path for folder in ("recipes", "eval") for path in (HOUSE / folder).glob("*.py"))


def config_of(script: Path) -> type:
    """The config class of a script."""
    spec = importlib.util.spec_from_file_location(f"flags_of_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclass looks up annotations
    spec.loader.exec_module(module)
    return vars(module).get("Config", LabelConfig)


def leaves(annotation: object) -> set[object]:
    """The types in an annotation: `tuple[int, ...] | None` -> int, NoneType, Ellipsis."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal or not arguments:
        return {annotation}
    return set().union(*map(leaves, arguments))


def numeric_flags(config: type) -> set[str]:
    hints, found = typing.get_type_hints(config), set()
    for field in fields(config):
        hint = hints[field.name]
        if is_dataclass(hint):
            found |= numeric_flags(hint)
        elif leaves(hint) & {int, float}:
            found.add(field.name)
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_number_has_bounds(script):
    assert numeric_flags(config_of(script)) - set(cli.BOUNDS) == set()


def test_a_number_without_bounds_is_noticed():
    assert isinstance(int | None, types.UnionType)
    assert numeric_flags(config_of(HOUSE / "eval" / "suite.py")) >= {"recall_k", "batch_size", "max_broken"}


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"lr": -0.1}, "--lr -0.1 must be at least 0"),
        ({"lr": float("nan")}, "--lr nan is not a finite number"),
        ({"wd": float("inf")}, "--wd inf is not a finite number"),
        ({"unheard_of": float("nan")}, "--unheard-of nan is not a finite number"),
        ({"temperature": 0.0}, "--temperature 0.0 must be above 0"),
        ({"ema_decay": 1.0}, "--ema-decay 1.0 must be at least 0 and below 1"),
        ({"recall_k": (1, 0)}, "--recall-k 0 must be at least 1"),
        ({"recall_k": ()}, "--recall-k has no value: give one, or leave it out"),
        ({"fewshot_k": 0}, "--fewshot-k 0 must be at least 1, or -1"),
        ({"seed": 2**31}, "--seed 2147483648 must be at least 0 and at most 2147483647"),
    ],
)
def test_values_are_checked_by_name(flags, message):
    with pytest.raises(UserError) as error:
        cli.check_values(flags)
    assert str(error.value).startswith(message)


def test_zero_none_and_truth_values_are_accepted():
    cli.check_values(
        {"lr": 0, "gamma": 0.0, "steps": None, "fewshot_k": -1, "debug": False, "eval_data": (), "warmup": 0, "seed": 0}
    )


CLIP = ["--steps", "2", "--workers", "0", "--batch-size", "4"]
NO_TEACHER = ["--teacher", "none", *CLIP]
LABELS = ["--pair", "resnet56-resnet20", "--data", "nowhere"]
IMAGES = ["--pair", "resnet34-resnet18", "--data", "a.tar", "--eval-data", "b.txt"]
SHARD = ["--model", "x", "--data", "a.tar"]
FEW_LABELS = ["--data", "nowhere"]
REFUSED = [
    # numbers out of bounds, in every script
    ("clip_kd", ["--lr", "-1"], "--lr -1.0 must be at least 0"),
    ("clip_kd", ["--lr", "nan"], "--lr nan is not a finite number"),
    ("clip_kd", ["--wmse-weight", "-1"], "--wmse-weight -1.0 must be at least 0"),
    ("clip_kd", ["--mimicry-weight", "-2"], "--mimicry-weight -2.0 must be at least 0"),
    ("clip_kd", ["--contrastive-weight", "-1"], "--contrastive-weight -1.0 must be at least 0"),
    ("clip_kd", ["--gamma", "-1"], "--gamma -1.0 must be at least 0"),
    ("clip_kd", ["--cross-wmse-weight", "-1"], "--cross-wmse-weight -1.0 must be at least 0"),
    ("clip_kd", ["--bank-size", "-1"], "--bank-size -1 must be at least 0"),
    ("clip_kd", ["--text-lr", "-1"], "--text-lr -1.0 must be at least 0"),
    ("clip_kd", ["--captions-per-image", "0"], "--captions-per-image 0 must be at least 1"),
    ("clip_kd", ["--temperature", "0"], "--temperature 0.0 must be above 0"),
    ("clip_kd", ["--workers", "-1"], "--workers -1 must be at least 0"),
    ("clip_kd", ["--keep-checkpoints", "-1"], "--keep-checkpoints -1 must be at least 0"),
    ("clip_kd", ["--eval-every-steps", "-5"], "--eval-every-steps -5 must be at least 0"),
    ("clip_kd", ["--seed", "-1"], "--seed -1 must be at least 0"),
    ("clip_robust", ["--ema-decay", "1"], "--ema-decay 1.0 must be at least 0 and below 1"),
    ("clip_image_tower", ["--mimicry-weight", "-1"], "--mimicry-weight -1.0 must be at least 0"),
    ("clip_unlabelled", ["--weight-temperature", "0"], "--weight-temperature 0.0 must be above 0"),
    ("cifar_kd", [*LABELS, "--ce-weight", "-1"], "--ce-weight -1.0 must be at least 0"),
    ("imagenet_kd", ["--pair", "x", "--warmup-epochs", "-1"], "--warmup-epochs -1 must be at least 0"),
    ("semi_supervised", ["--threshold", "1.5"], "--threshold 1.5 must be at least 0 and at most 1"),
    ("semi_supervised", ["--num-labels", "0"], "--num-labels 0 must be at least 1"),
    ("semi_supervised", ["--layer-decay", "0"], "--layer-decay 0.0 must be above 0 and at most 1"),
    ("adversarial", ["--awp-gamma", "-0.1"], "--awp-gamma -0.1 must be at least 0"),
    ("adversarial", ["--fraction", "-0.1"], "--fraction -0.1 must be at least 0 and at most 1"),
    ("zero_shot", ["--max_broken", "2"], "--max-broken 2.0 must be at least 0 and below 1"),
    ("zero_shot", ["--attack", "apgd", "--attack-images", "0"], "--attack-images 0 must be at least 1"),
    ("zero_shot", ["--batch_size", "0"], "--batch-size 0 must be at least 1"),
    ("retrieval", ["--recall_k", "0"], "--recall-k 0 must be at least 1"),
    ("suite", ["--recall_k"], "--recall-k has no value"),
    ("linear_probe", ["--dataset", "x", "--fewshot_k", "0"], "--fewshot-k 0 must be at least 1, or -1"),
    ("autoattack", ["--model", "x", "--data", "y", "--images", "0"], "--images 0 must be at least 1"),
    # an empty text in place of a value
    ("clip_kd", ["--resume", ""], "--resume is an empty text"),
    ("clip_kd", ["--train-data", ""], "--train-data is an empty text"),
    ("clip_kd", ["--output-dir", ""], "--output-dir is an empty text: give a value, or leave it out"),
    ("clip_kd", ["--output-dir="], "--output-dir is an empty text: give a value, or leave it out"),
    ("suite", ["--output", " "], "--output is an empty text: give a value, or leave it out"),
    ("clip_kd", ["--push-to-hub", ""], "--push-to-hub is an empty text"),
    ("linear_probe", ["--dataset", "x", "--train_split", ""], "--train_split is an empty text"),
    ("zero_shot", ["--attack", "apgd", "--epsilon", ""], "--epsilon is an empty text"),
    ("clip_robust", ["--epsilon", "8/"], "an epsilon of '8/' is no number"),
    # flags that would have no effect
    ("clip_kd", [*NO_TEACHER, "--mimicry-weight", "5"], "--mimicry-weight 5.0 has no effect with --teacher none"),
    ("clip_kd", [*NO_TEACHER, "--gamma", "0.25"], "--gamma 0.25 has no effect with --teacher none"),
    ("clip_kd", [*NO_TEACHER, "--bank-size", "9"], "--bank-size 9 has no effect with --teacher none"),
    ("clip_kd", [*NO_TEACHER, "--cross-soft-ce-weight", "9"], "--cross-soft-ce-weight 9.0 has no effect with"),
    (
        "clip_kd",
        ["--cross-soft-ce-weight", "0", "--cross-wmse-weight", "0", "--bank-size", "9"],
        "--bank-size 9 has no effect without --cross-soft-ce-weight or --cross-wmse-weight: leave it out",
    ),
    ("clip_kd", [*NO_TEACHER, "--teacher-pretrained", "openai"], "--teacher-pretrained openai has no effect with"),
    ("clip_kd", [*CLIP, "--teacher-pretrained", "openai"], "which carries its own weights: leave it out"),
    ("clip_kd", [*NO_TEACHER, "--columns", "a", "b"], "has no effect without --train-data: leave it out"),
    ("clip_robust", [*NO_TEACHER, "--columns", "a", "b"], "has no effect without --train-data: leave it out"),
    ("clip_image_tower", [*CLIP, "--columns", "a"], "--columns a has no effect without --train-data"),
    ("zero_shot", ["--texts-of", "teacher"], "--texts-of teacher needs a teacher: name it with --teacher"),
    ("clip_unlabelled", [*CLIP, "--image-column", "a"], "--image-column a has no effect without --train-data"),
    ("clip_kd", [*NO_TEACHER, "--warmup", "3"], "--warmup 3 is longer than the run of 2 steps: lower it"),
    (
        "clip_kd",
        [*NO_TEACHER, "--dataset-root", "sets", "--eval-data"],
        "--dataset-root sets has no effect without sets in --eval-data",
    ),
    ("cifar_kd", [*LABELS, "--stored-top-k", "5"], "--stored-top-k 5 has no effect without --stored-views"),
    ("cifar_kd", [*LABELS, "--method", "kd", "--gamma", "1"], "--gamma 1.0 has no effect with --method kd"),
    ("cifar_kd", [*LABELS, "--method", "dkd", "--wmse-weight", "1"], "--wmse-weight 1.0 has no effect with"),
    ("cifar_kd", [*LABELS, "--method", "dkl", "--class-prior", "True"], "--class-prior True has no effect with"),
    ("cifar_kd", [*LABELS, "--method", "ikl", "--gamma", "0.5"], "--gamma 0.5 has no effect with --method ikl"),
    ("cifar_kd", [*LABELS, "--method", "ce", "--ce-weight", "2"], "--ce-weight 2.0 has no effect with --method ce"),
    ("cifar_kd", [*LABELS, "--method", "ce", "--teacher", "vgg13"], "--teacher vgg13 has no effect with --method ce"),
    ("cifar_kd", [*LABELS, "--method", "ce", "--root", "x"], "--root x is for lists (.txt) and has no effect on nowh"),
    ("imagenet_kd", [*IMAGES, "--columns", "a", "b"], "--columns a b are of tables (parquet, the Hub) and have no eff"),
    ("autoattack", [*SHARD, "--columns", "a", "b"], "have no effect on a.tar: leave them out"),
    ("autoattack", [*SHARD, "--root", "b"], "--root b is for lists (.txt) and has no effect on a.tar: leave it out"),
    ("adversarial", ["--method", "natural", "--budget", "low"], "--budget low has no effect with --method natural"),
    ("adversarial", ["--method", "trades", "--gamma", "1"], "--gamma 1.0 has no effect with --method trades"),
    ("adversarial", ["--method", "gkl", "--kl-weight", "5"], "--kl-weight 5.0 has no effect with --method gkl"),
    ("semi_supervised", [*FEW_LABELS, "--method", "supervised", "--mu", "3"], "--mu 3 has no effect with --method"),
    ("semi_supervised", [*FEW_LABELS, "--consistency", "hard", "--gamma", "1"], "--gamma 1.0 has no effect with"),
    ("semi_supervised", [*FEW_LABELS, "--consistency", "kl", "--class-prior"], "--class-prior True has no effect"),
    ("semi_supervised", [*FEW_LABELS, "--layer-decay", "0.5"], "--layer-decay 0.5 has no effect with the SGD of"),
    ("semi_supervised", ["--steps", "5", "--warmup-steps", "6"], "--warmup-steps 6 is longer than the run of 5 steps"),
    ("zero_shot", ["--attack_images", "9"], "--attack-images 9 has no effect without an attack: add --attack apgd"),
    ("clip_unlabelled", ["--class-prior", "--wmse-weight", "0"], "has no effect with --wmse-weight 0: give --no-class"),
    ("retrieval", ["--custom_template_file", "x.json"], "--custom-template-file x.json has no effect on retrieval"),
    (
        "linear_probe",
        ["--dataset", "emoji", "--custom_template_file", "x.json"],
        "--custom-template-file x.json has no effect on a linear probe",
    ),
    ("zero_shot", ["--attack_norm", "l2"], "--attack-norm l2 has no effect without an attack"),
    (
        "autoattack",
        ["--model", "x", "--data", "y", "--masking-images", "5"],
        "--masking-images 5 has no effect without --check-masking: add it",
    ),
    # trackers that are not installed
    ("clip_kd", ["--report-to", "trackio"], "--report-to trackio needs its package: pip install trackio"),
    ("cifar_kd", [*LABELS, "--report-to", "wandb"], "--report-to wandb needs its package: pip install wandb"),
    ("adversarial", ["--report-to", "tensorboard"], "--report-to tensorboard needs its package: pip install tensor"),
]


@pytest.mark.parametrize(
    "script, flags, message", REFUSED, ids=[f"{script} {' '.join(flags)}"[:60] for script, flags, _ in REFUSED]
)
def test_a_value_that_cannot_be_used_is_one_line(run_script, tmp_path, monkeypatch, script, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "TRACKERS", dict.fromkeys(run_module.TRACKERS, lambda: False))
    (path,) = (path for path in SCRIPTS if path.stem == script)
    code, _, error = run_script(path, *flags)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1, error
    assert os.listdir(tmp_path) == []


def test_a_tracker_that_is_installed_is_accepted(monkeypatch):
    monkeypatch.setattr(run_module, "TRACKERS", {"wandb": lambda: True})
    run_module.check_trackers(("wandb",))
    run_module.check_trackers(())
