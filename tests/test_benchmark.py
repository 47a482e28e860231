"""Results have CLIP_benchmark's keys and values, equal for names, folders and objects; with a teacher they include a
comparison on the same images."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import ColourBlind, colour_blind_clip
from small_sets import COLOURS, colour_set, picture, write_set

from gkl_vl.atomic import append_line
from gkl_vl.errors import UserError
from gkl_vl.evaluation.benchmark import (
    comparison,
    evaluate,
    measure,
    metrics_of,
    refuse_random_weights,
    result,
    result_path,
)
from gkl_vl.evaluation.embed import Embedder
from gkl_vl.evaluation.sets import load_benchmark_set
from gkl_vl.evaluation.tables import results_text
from gkl_vl.models.clip import BUNDLED_TEACHER, Clip, load_clip
from gkl_vl.models.towers import OpenClipTowers

CLASSIFICATION, RETRIEVAL, CHOICE = "zeroshot_classification", "zeroshot_retrieval", "image_caption_selection"


@pytest.fixture
def colour_blind() -> Clip:
    return colour_blind_clip()


@pytest.fixture
def colours(tmp_path):
    order = ["red", "green", "blue", "blue", "red", "red", "green"]
    return load_benchmark_set(str(colour_set(tmp_path / "colours", order)))


def test_zero_shot_of_a_colour_blind_model(colour_blind, colours):
    (outcome,) = measure(Embedder(clip=colour_blind, batch_size=3), colours)
    metrics = metrics_of([outcome])
    assert metrics["acc1"] == 5 / 7  # the two blue images are classified as green
    assert metrics["mean_per_class_recall"] == pytest.approx(2 / 3)
    assert np.isnan(metrics["acc5"])
    assert (outcome.task, outcome.images, outcome.broken) == (CLASSIFICATION, 7, 0)


def test_retrieval_of_a_colour_blind_model(tmp_path, colour_blind):
    def recalls(colours: list[str], recall_k: tuple[int, ...]) -> dict[str, float]:
        dataset = load_benchmark_set(str(colour_set(tmp_path / colours[0], colours)))
        return metrics_of(measure(Embedder(clip=colour_blind), dataset, [RETRIEVAL], recall_k=recall_k))

    assert recalls(["red", "green"], (1,)) == {"image_retrieval_recall@1": 1, "text_retrieval_recall@1": 1}
    # Both images have the embedding of green: the green texts rank first for both, so only the green image is a hit.
    metrics = recalls(["green", "blue"], (2, 3))
    assert metrics["text_retrieval_recall@2"] == 0.5 and metrics["text_retrieval_recall@3"] == 1


def npy(labels: list[int]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(labels))
    return file.getvalue()


def test_images_with_several_labels(tmp_path, colour_blind):
    samples = [
        (f"s{i}", {"png": picture(colour), "npy": npy(labels)})
        for i, (colour, labels) in enumerate([("red", [1, 0, 0]), ("green", [0, 1, 1]), ("red", [0, 1, 0])])
    ]
    files = dict(dataset_type=["multilabel"], classnames=list(COLOURS), zeroshot_classification_templates=["{c}"])
    dataset = load_benchmark_set(str(write_set(tmp_path / "set", [samples], **files)))
    (outcome,) = measure(Embedder(clip=colour_blind), dataset)
    # red: images 0 and 2 tie, the positive one is first: 1. green: image 1, then 0 and 2 tie: (1 + 2/3) / 2.
    # blue: no image has its embedding, and red is slightly more similar to it than green: the positive is third, 1/3.
    assert metrics_of([outcome]) == {"mean_average_precision": pytest.approx((1 + 5 / 6 + 1 / 3) / 3)}


def test_the_first_caption_of_a_choice_is_the_correct_one(tmp_path, colour_blind):
    captions = [("red", b"something red\nsomething green"), ("green", b"something red\nsomething green")]
    samples = [(f"s{i}", {"png": picture(c), "txt": text}) for i, (c, text) in enumerate(captions)]
    dataset = load_benchmark_set(str(write_set(tmp_path / "set", [samples], dataset_type=["retrieval"])))
    metrics = metrics_of(measure(Embedder(clip=colour_blind), dataset, [CHOICE]))
    assert metrics == {"image_acc": 1, "text_acc": 0.5, "acc": 0.5}


def test_two_tasks_together_equal_each_alone_and_embed_an_image_once(colour_blind, colours):
    embedder = Embedder(clip=colour_blind, batch_size=3)
    alone = [measure(embedder, colours, [task])[0] for task in (CLASSIFICATION, RETRIEVAL)]
    seen = []
    encode = colour_blind.towers.model.encode_image
    colour_blind.towers.model.encode_image = lambda pixels, normalize: (seen.append(len(pixels)), encode(pixels, 0))[1]
    both = measure(embedder, colours, [CLASSIFICATION, RETRIEVAL])
    assert metrics_of(both) == pytest.approx(metrics_of(alone), nan_ok=True)
    assert seen == [3, 3, 1]


def test_sets_that_do_not_fit_the_task_are_refused(tmp_path, colour_blind):
    def refusal(**files) -> str:
        root = write_set(tmp_path / str(len(list(tmp_path.iterdir()))), [[]], **files)
        with pytest.raises(UserError) as caught:
            measure(Embedder(clip=colour_blind), load_benchmark_set(str(root)), [CLASSIFICATION])
        return str(caught.value)

    assert "it has no classes" in refusal(dataset_type=["retrieval"])
    assert "class" in refusal()


def test_invalid_recall_k_is_refused(colour_blind, colours):
    for recall_k in ((), (5, 0)):
        with pytest.raises(ValueError, match="recall_k"):
            measure(Embedder(clip=colour_blind), colours, [RETRIEVAL], recall_k=recall_k)


def test_a_result_has_clip_benchmarks_keys_and_more(colour_blind, colours):
    (outcome,) = measure(Embedder(clip=colour_blind), colours)
    line = result(outcome, colours, model="m", pretrained="p", name="wds/colours", draws=50, seed=4)
    theirs = {"dataset": "wds/colours", "model": "m", "pretrained": "p", "task": CLASSIFICATION, "language": "en"}
    assert theirs.items() <= line.items()
    assert line["metrics"].keys() == {"acc1", "acc5", "mean_per_class_recall"}
    assert (line["n"], line["broken"], line["seed"]) == (7, 0, 4)
    low, high = line["intervals"]["acc1"]
    assert low <= 5 / 7 <= high and low < high
    assert 0 <= line["extra"]["ece"] <= 1
    json.dumps(line)
    again = result(outcome, colours, model="m", pretrained="p", draws=50, seed=4)
    assert again["intervals"]["acc1"] == [low, high] and again["dataset"] == colours.name


def test_what_makes_a_number_mean_less_is_said(tmp_path, colour_blind):
    root = tmp_path / "cifar10"
    colour_set(root, ["red", "green"])
    dataset = load_benchmark_set("cifar10", root=str(root))
    tasks = [CLASSIFICATION, RETRIEVAL]
    lines = evaluate(colour_blind, [dataset], tasks=tasks, recall_k=(1, 2), draws=5)
    assert [(line["n"], line["release"]) for line in lines] == 2 * [(2, 10_000)]
    assert [line["empty_classes"] for line in lines] == [1, 0]
    assert math.isnan(lines[0]["metrics"]["acc5"]) and lines[0]["metrics"]["mean_per_class_recall"] == 1
    text = results_text(lines)
    assert text.count("cifar10, 2 of the release's 10,000 images") == 2
    assert "1 of the classes have no image: the mean over classes is over the others" in text
    assert "image_retrieval_recall@2, text_retrieval_recall@2 of 2 images is 1 for any model" in text
    assert text.count("fewer than 30 images: the intervals are too narrow") == 2


def test_classes_without_images_count_as_0_in_the_mean_average_precision(tmp_path, colour_blind):
    samples = [(f"s{i}", {"png": picture("red"), "npy": npy([1, 0, 0])}) for i in range(30)]
    files = dict(dataset_type=["multilabel"], classnames=list(COLOURS), zeroshot_classification_templates=["{c}"])
    dataset = load_benchmark_set(str(write_set(tmp_path / "set", [samples], **files)))
    (line,) = evaluate(colour_blind, [dataset], draws=5)
    assert (line["metrics"]["mean_average_precision"], line["empty_classes"]) == (pytest.approx(1 / 3), 2)
    text = results_text([line])
    assert "2 of the classes have no image: the mean over classes counts them as 0" in text and "fewer" not in text


class Seeing(ColourBlind):
    """Distinguishes blue from green."""

    def encode_image(self, pixels, normalize):
        return F.normalize(pixels.mean(dim=(2, 3)).clamp(min=0.01), dim=-1)


def test_a_student_is_compared_with_its_teacher(colour_blind, colours):
    seeing = replace(colour_blind, name="seeing", towers=OpenClipTowers(Seeing()))
    student, teacher = (measure(Embedder(clip=clip), colours)[0] for clip in (colour_blind, seeing))
    compared = comparison(student, teacher, colours, teacher_name="seeing", draws=200)["teacher"]
    assert compared["model"] == "seeing" and compared["metrics"]["acc1"] == 1
    assert compared["kept"]["acc1"] == pytest.approx(5 / 7) and "ece" not in compared["kept"]
    low, high = compared["kept_intervals"]["acc1"]
    assert low < 5 / 7 < high <= 1
    assert compared["difference"]["acc1"]["value"] == pytest.approx(-2 / 7)
    assert compared["likeness"]["agreement@1"] == pytest.approx(5 / 7)
    assert math.isnan(compared["likeness"]["top5_overlap"]) and compared["likeness"]["kl"] > 0
    assert compared["per_class"]["blue"] == {"student": 0, "teacher": 1, "n": 2}
    assert compared["per_class"]["red"] == {"student": 1, "teacher": 1, "n": 3}
    # Compared with itself, a model keeps everything and nothing differs.
    same = comparison(teacher, teacher, colours, teacher_name="seeing", draws=20)["teacher"]
    assert same["kept"]["acc1"] == 1 and same["difference"]["acc1"]["p"] == 1
    expected = {"agreement@1": 1, "top5_overlap": math.nan, "kl": 0}
    assert same["likeness"] == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_logits_have_the_models_own_scale(colour_blind, colours):
    (outcome,) = measure(Embedder(clip=colour_blind), colours)
    text = F.normalize(torch.eye(3) + 0.1, dim=-1)
    image = F.normalize(torch.tensor([1.0, 0.02, 0.0]), dim=-1)
    expected = math.exp(3) * text @ image  # log scale 3; a red picture
    assert outcome.logits is not None
    torch.testing.assert_close(outcome.logits[0], expected, rtol=1e-5, atol=1e-5)


def test_evaluate_returns_plain_dicts_for_names_folders_and_objects(tmp_path, colour_blind):
    root = colour_set(tmp_path / "sets" / "colours", ["red", "green", "blue"])
    seeing = replace(colour_blind, name="seeing", towers=OpenClipTowers(Seeing()))
    (by_name,) = evaluate(seeing, ["colours"], dataset_root=str(root), teacher=colour_blind, draws=20)
    (by_object,) = evaluate(seeing, [load_benchmark_set(str(root))], draws=20)
    assert json.dumps(by_name["metrics"]) == json.dumps(by_object["metrics"])
    assert by_name["model"] == "seeing" and by_name["teacher"]["model"] == "colour-blind"
    assert "teacher" not in by_object and type(by_object) is dict
    tasks = [row["task"] for row in evaluate(seeing, [str(root)], tasks=[RETRIEVAL, CLASSIFICATION], draws=20)]
    assert tasks == [RETRIEVAL, CLASSIFICATION]


def test_a_run_folder_loads_its_exported_student(tmp_path):
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    with pytest.raises(UserError, match="is a folder but not a finished run"):
        load_clip(str(run))
    (run / "model").symlink_to(BUNDLED_TEACHER.removeprefix("local-dir:"))
    clip = load_clip(str(run))
    assert clip.name == str(run) and clip.embed_dim == load_clip(BUNDLED_TEACHER).embed_dim
    refuse_random_weights(str(run), None)
    with pytest.raises(UserError, match="carries its own weights"):
        load_clip(str(run), "openai")


def test_result_files_are_named_as_clip_benchmark_names_them(tmp_path):
    names = {"dataset": "vtab/pets", "model": "local-dir:/runs/a/model/", "pretrained": "laion2b_s34b_b79k"}
    template = f"{tmp_path}/out/{{dataset}}_{{pretrained}}_{{model}}_{{language}}_{{task}}.json"
    path = result_path(template, task="zeroshot_retrieval", **names)
    expected = "vtab_pets_laion2b_s34b_b79k_local-dir_runs_a_model_en_zeroshot_retrieval.json"
    assert path == tmp_path / "out" / expected
    with pytest.raises(UserError, match="known are {dataset}"):
        result_path("{size}.json", task="t", **names)
    with pytest.raises(UserError, match="name another file"):
        result_path(str(tmp_path), task="t", **names)


def test_results_are_appended_one_json_line_each(tmp_path):
    path = tmp_path / "result.json"
    for metrics in ({"acc1": 0.25}, {"acc1": 0.5}):
        append_line(path, {"dataset": "d", "metrics": metrics})
    lines = list(map(json.loads, path.read_text().splitlines()))
    assert lines == [{"dataset": "d", "metrics": {"acc1": 0.25}}, {"dataset": "d", "metrics": {"acc1": 0.5}}]


def test_an_architecture_without_weights_is_not_scored():
    with pytest.raises(UserError, match="'ViT-B-32' has random weights"):
        refuse_random_weights("ViT-B-32", None)
    refuse_random_weights("ViT-B-32", "openai")
    refuse_random_weights("local-dir:runs/x/model", None)
