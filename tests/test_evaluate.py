"""The metrics are CLIP_benchmark's, in name and value, on matrices drawn by hand and against its formulas
transcribed; evaluating leaves model and random states as they were; no cost setting changes a number."""

import json
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from small_sets import COLOURS, colour_set, picture, write_set
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gkl_vl.data.benchmark_sets import load_benchmark_set
from gkl_vl.errors import UserError
from gkl_vl.evaluate import (
    append_result,
    classification_metrics,
    embed_images,
    evaluate_clip,
    format_metrics,
    mean_per_class_recall,
    refuse_random_weights,
    result_path,
    retrieval_metrics,
    top_k_accuracy,
    zero_shot_classifier,
)
from gkl_vl.towers import Clip, OpenClipTowers, load_clip

zero_shot = partial(evaluate_clip, tasks=["zero_shot"])
retrieval = partial(evaluate_clip, tasks=["retrieval"])

# ---- CLIP_benchmark 1.6.2, transcribed: metrics/zeroshot_classification.py and metrics/zeroshot_retrieval.py


def clip_benchmark_classifier(encode_text, tokenizer, classnames, templates):
    weights = []
    for classname in classnames:
        if type(templates) is dict:
            texts = templates[classname]
        else:
            texts = [template.format(c=classname) for template in templates]
        embedding = F.normalize(encode_text(tokenizer(texts)), dim=-1).mean(dim=0)
        weights.append(embedding / embedding.norm())
    return torch.stack(weights, dim=1)


def clip_benchmark_accuracy(output, target, topk):
    pred = output.topk(max(topk), 1, True, True)[1].t()
    correct = pred.eq(target.view(1, -1).expand_as(pred))
    return [float(correct[:k].reshape(-1).float().sum()) / len(target) for k in topk]


def balanced_accuracy(target, pred):
    """scikit-learn's: mean recall of the classes that occur."""
    recalls = [(pred[target == c] == c).double().mean() for c in target.unique()]
    return torch.stack(recalls).mean().item()


def clip_benchmark_retrieval(images, texts, texts_image_index, recall_k_list):
    scores = texts @ images.t()
    positive_pairs = torch.zeros_like(scores, dtype=torch.bool)
    positive_pairs[torch.arange(len(scores)), texts_image_index] = True
    metrics = {}
    for k in recall_k_list:
        for name, s, p in (("image", scores, positive_pairs), ("text", scores.T, positive_pairs.T)):
            one_hot = F.one_hot(torch.topk(s, k, dim=1)[1], num_classes=s.shape[1])
            found = (one_hot * p.reshape(len(s), 1, -1)).sum(dim=(1, 2))
            recall = found / p.sum(dim=1)
            metrics[f"{name}_retrieval_recall@{k}"] = (recall > 0).float().mean().item()
    return metrics


# ---- numbers


def test_top_k_accuracy_by_hand():
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 3, 2, 1], [0, 1, 2, 3]])
    labels = torch.tensor([0, 2, 0])
    assert [top_k_accuracy(logits=logits, labels=labels, k=k) for k in (1, 2, 3, 4)] == [
        1 / 3,
        2 / 3,
        2 / 3,
        1,
    ]


def test_mean_per_class_recall_by_hand():
    logits = torch.eye(4)[torch.tensor([0, 0, 1, 2, 2])]  # the predictions
    labels = torch.tensor([0, 1, 1, 1, 2])  # class 3 does not occur and does not count
    assert mean_per_class_recall(logits=logits, labels=labels) == pytest.approx((1 + 1 / 3 + 1) / 3)


@pytest.mark.parametrize("classes", [2, 4, 5, 23])
@pytest.mark.parametrize("ties", [False, True])
def test_classification_is_clip_benchmarks(classes, ties):
    logits = torch.randint(0, 3, (60, classes)).float() if ties else torch.randn(60, classes)
    labels = torch.randint(0, classes, (60,))
    metrics = classification_metrics(logits=logits, labels=labels)
    if classes >= 5:
        acc1, acc5 = clip_benchmark_accuracy(logits, labels, (1, 5))
        assert (metrics["acc1"], metrics["acc5"]) == pytest.approx((acc1, acc5))
    else:
        assert metrics["acc1"] == pytest.approx(clip_benchmark_accuracy(logits, labels, (1,))[0])
        assert np.isnan(metrics["acc5"])
    assert metrics["mean_per_class_recall"] == pytest.approx(balanced_accuracy(labels, logits.argmax(1)))


def test_retrieval_by_hand():
    # Two images; texts 0 and 1 belong to image 0, text 2 to image 1. Scores:
    #            image 0  image 1
    #   text 0     1.0      0.0     finds its image
    #   text 1     0.0      1.0     finds the other first
    #   text 2     0.6      0.8     finds its image
    # Image 0 finds text 0, one of its two: a hit. Image 1 finds text 1, not its own: a miss, mended at K = 2.
    image = torch.eye(2)
    text = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]])
    metrics = retrieval_metrics(image=image, text=text, owners=torch.tensor([0, 0, 1]), recall_k=(1, 2))
    assert metrics == {
        "image_retrieval_recall@1": 2 / 3,
        "image_retrieval_recall@2": 1,
        "text_retrieval_recall@1": 1 / 2,
        "text_retrieval_recall@2": 1,
    }


@pytest.mark.parametrize("tile_rows", [1, 7, 1024])
@pytest.mark.parametrize("ties", [False, True])
def test_retrieval_is_clip_benchmarks_whatever_the_tile(tile_rows, ties):
    # Whole numbers score exactly, so ties are ties in both; topk must then break them alike.
    image = torch.randint(-1, 2, (20, 4)).float() if ties else F.normalize(torch.randn(20, 8), dim=-1)
    text = torch.randint(-1, 2, (61, 4)).float() if ties else F.normalize(torch.randn(61, 8), dim=-1)
    owners = torch.cat([torch.arange(20), torch.randint(0, 20, (41,))])
    metrics = retrieval_metrics(image=image, text=text, owners=owners, recall_k=(1, 5, 10), tile_rows=tile_rows)
    assert metrics == pytest.approx(clip_benchmark_retrieval(image, text, owners, (1, 5, 10)))


def test_more_answers_than_candidates_is_a_hit():
    image, text = torch.eye(3), -torch.eye(3)
    metrics = retrieval_metrics(image=image, text=text, owners=torch.arange(3), recall_k=(1, 10))
    assert metrics["image_retrieval_recall@10"] == metrics["text_retrieval_recall@10"] == 1
    assert metrics["image_retrieval_recall@1"] == 0


def test_the_whole_score_matrix_never_exists():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    image, text = torch.randn(300, 4), torch.randn(900, 4)
    with Watch():
        retrieval_metrics(image=image, text=text, owners=torch.arange(900) % 300, tile_rows=10)
    assert largest <= 10 * 900


def test_half_precision_is_lifted_before_scores_are_compared():
    # bf16 scores have 8 bits: of these near neighbours most would tie.
    image = (1 + 0.1 * torch.randn(200, 16)).bfloat16()
    text, owners = (image.float() + 0.02 * torch.randn(200, 16)).bfloat16(), torch.arange(200)
    half = retrieval_metrics(image=image, text=text, owners=owners)
    assert half == retrieval_metrics(image=image.float(), text=text.float(), owners=owners)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: top_k_accuracy(logits=torch.zeros(2, 3), labels=torch.zeros(2).long(), k=4), "k=4"),
        (lambda: top_k_accuracy(logits=torch.zeros(0, 3), labels=torch.zeros(0).long(), k=1), "0 rows"),
        (lambda: classification_metrics(logits=torch.zeros(0, 3), labels=torch.zeros(0).long()), "0 rows"),
        (
            lambda: retrieval_metrics(image=torch.eye(2), text=torch.eye(2), owners=torch.tensor([0, 2])),
            "0..2",
        ),
        (
            lambda: retrieval_metrics(image=torch.eye(2), text=torch.eye(2)[:0], owners=torch.arange(0)),
            "0 texts",
        ),
        (
            lambda: retrieval_metrics(image=torch.eye(2), text=torch.eye(2), owners=torch.arange(2), recall_k=(0,)),
            "recall_k=(0,)",
        ),
    ],
)
def test_undefined_numbers_are_refused(call, told):
    with pytest.raises(ValueError, match="^[^\n]*$") as caught:
        call()
    assert told in str(caught.value)


# ---- prompts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Clip:
    """A real open_clip model with random weights."""
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    path = tmp_path_factory.mktemp("model") / "tiny-evaluate.json"
    path.write_text(json.dumps(config))
    torch.manual_seed(0)
    return load_clip(str(path))


CLASSES = ["cat", "dog {x}", "red panda", "emu"]
TEMPLATES = ["a photo of a {c}.", "{c}", "{c} or {c}?"]
CUPL = {name: [f"{name} {index}" for index in range(1 + index)] for index, name in enumerate(CLASSES)}


@pytest.mark.parametrize("templates", [TEMPLATES, CUPL], ids=["templates", "cupl"])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
@torch.no_grad()
def test_the_classifier_is_clip_benchmarks_whatever_the_batch(tiny, templates, batch_size):
    ours = zero_shot_classifier(
        encode_text=tiny.towers.encode_text,
        tokenize=tiny.tokenize,
        classnames=CLASSES,
        templates=templates,
        batch_size=batch_size,
    )
    theirs = clip_benchmark_classifier(tiny.towers.encode_text, tiny.tokenize, CLASSES, templates)
    torch.testing.assert_close(ours, theirs.T, rtol=0, atol=1e-6)  # fp32 rounding of unit vectors


def test_the_classifier_is_open_clips(tiny):
    theirs = open_clip.build_zero_shot_classifier(
        tiny.towers.model, tiny.tokenize, CLASSES, [template.replace("{c}", "{0}") for template in TEMPLATES]
    )
    with torch.no_grad():
        ours = zero_shot_classifier(
            encode_text=tiny.towers.encode_text,
            tokenize=tiny.tokenize,
            classnames=CLASSES,
            templates=TEMPLATES,
            batch_size=7,
        )
    torch.testing.assert_close(ours, theirs.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("templates", "told"), [(["a cat"], "'a cat'"), ({"cat": ["x"], "emu": []}, "'emu'")])
def test_prompts_without_a_class_are_refused(templates, told):
    with pytest.raises(UserError, match=told):
        zero_shot_classifier(
            encode_text=torch.Tensor.float,
            tokenize=lambda texts: torch.zeros(len(texts), 3),
            classnames=["cat", "emu"],
            templates=templates,
            batch_size=4,
        )


# ---- whole sets


class ColourBlind(nn.Module):
    """An image is the mean of its channels; a text the colour it names, and everything blue looks green."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(3)

    def encode_image(self, pixels, normalize):
        red, green, blue = pixels.mean(dim=(2, 3)).clamp(min=0.01).unbind(dim=1)
        seen = self.norm(self.dropout(torch.stack([red, green + blue, 0 * blue], dim=1)))
        return F.normalize(self.gain * seen, dim=-1)

    def encode_text(self, tokens, normalize):
        return F.normalize(F.one_hot(tokens[:, 0], 4)[:, :3].float() + 0.1, dim=-1)


def name_colours(texts: list[str]) -> torch.Tensor:
    rows = [next((i for i, colour in enumerate(COLOURS) if colour in text), 3) for text in texts]
    return torch.tensor(rows)[:, None]


@pytest.fixture
def colour_blind() -> Clip:
    return Clip(
        name="colour-blind",
        towers=OpenClipTowers(ColourBlind()),
        preprocess=PreprocessCfg(size=8, mean=(0, 0, 0), std=(1, 1, 1)),
        tokenize=name_colours,
        hf_tokenizer=None,
        model_cfg={},
    )


@pytest.fixture
def colours(tmp_path):
    order = ["red", "green", "blue", "blue", "red", "red", "green"]
    return load_benchmark_set(str(colour_set(tmp_path / "colours", order)))


def test_zero_shot_of_a_colour_blind_model(colour_blind, colours):
    metrics = zero_shot(clip=colour_blind, dataset=colours, batch_size=3)
    assert metrics["acc1"] == 5 / 7  # the two blue ones are taken for green
    assert metrics["mean_per_class_recall"] == pytest.approx(2 / 3)
    assert np.isnan(metrics["acc5"])


def test_retrieval_of_a_model_that_sees_colours(tmp_path, colour_blind):
    dataset = load_benchmark_set(str(colour_set(tmp_path / "set", ["red", "green"])))
    metrics = retrieval(clip=colour_blind, dataset=dataset, recall_k=(1,))
    assert metrics == {"image_retrieval_recall@1": 1, "text_retrieval_recall@1": 1}
    dataset = load_benchmark_set(str(colour_set(tmp_path / "blue", ["green", "blue"])))
    # Both pictures look green: green texts come first for either, so only the green one finds its own.
    metrics = retrieval(clip=colour_blind, dataset=dataset, recall_k=(2, 3))
    assert metrics["text_retrieval_recall@2"] == 0.5 and metrics["text_retrieval_recall@3"] == 1


def test_zero_shot_and_retrieval_are_clip_benchmarks_on_a_real_model(tmp_path, tiny):
    # One picture per colour: equal pictures would tie up to the last bit, which the batch size changes.
    colours = load_benchmark_set(str(colour_set(tmp_path / "set", ["red", "green", "blue"])))
    pixels = torch.stack([tiny.image_transform()(image) for image, _ in colours])
    labels = torch.tensor([label for _, label in colours])
    captions = [record.targets["txt"] for record in colours.records("txt")]
    texts = [text for of_image in captions for text in of_image]
    owners = torch.tensor([index for index, of_image in enumerate(captions) for _ in of_image])
    tiny.towers.eval()
    with torch.no_grad():
        image = tiny.towers.encode_image(pixels)
        text = tiny.towers.encode_text(tiny.tokenize(texts))
        weights = clip_benchmark_classifier(
            tiny.towers.encode_text, tiny.tokenize, colours.classnames, colours.templates
        )
    logits = image @ weights
    metrics = zero_shot(clip=tiny, dataset=colours, batch_size=2)
    assert metrics["acc1"] == pytest.approx(clip_benchmark_accuracy(logits, labels, (1,))[0])
    assert metrics["mean_per_class_recall"] == pytest.approx(balanced_accuracy(labels, logits.argmax(1)))
    metrics = retrieval(clip=tiny, dataset=colours, recall_k=(1, 2), batch_size=2)
    assert metrics == pytest.approx(clip_benchmark_retrieval(image, text, owners, (1, 2)))


def test_both_tasks_together_are_each_alone_and_embed_an_image_once(tmp_path, tiny):
    colours = load_benchmark_set(str(colour_set(tmp_path / "set", ["red", "green", "blue", "green", "red"])))
    alone = zero_shot(clip=tiny, dataset=colours, batch_size=2) | retrieval(clip=tiny, dataset=colours, batch_size=2)
    seen = []
    handle = tiny.towers.model.visual.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    both = evaluate_clip(clip=tiny, dataset=colours, tasks=["zero_shot", "retrieval"], batch_size=2)
    handle.remove()
    assert both == pytest.approx(alone, nan_ok=True) and {"acc1", "text_retrieval_recall@1"} <= both.keys()
    assert seen == [2, 2, 1]


@pytest.mark.filterwarnings("default:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 0), (100, 0), (2, 1), (1, 2), (3, 2)])
def test_rows_keep_the_order_of_the_set(colour_blind, colours, batch_size, num_workers):
    image, targets = embed_images(
        encode_image=lambda pixels: pixels.mean(dim=(2, 3)),
        transform=colour_blind.image_transform(),
        dataset=colours,
        targets=["cls"],
        batch_size=batch_size,
        num_workers=num_workers,
    )
    assert targets == {"cls": [0, 1, 2, 2, 0, 0, 1]}
    assert image.argmax(dim=1).tolist() == targets["cls"]


def test_evaluating_leaves_no_trace(colour_blind, colours):
    towers = colour_blind.towers
    towers.train()
    towers.model.norm.eval()  # a student with frozen statistics
    weights = {name: value.clone() for name, value in towers.state_dict().items()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    first = zero_shot(clip=colour_blind, dataset=colours)
    retrieval(clip=colour_blind, dataset=colours)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert [towers.training, towers.model.dropout.training, towers.model.norm.training] == [True, True, False]
    assert all(torch.equal(value, weights[name]) for name, value in towers.state_dict().items())
    assert zero_shot(clip=colour_blind, dataset=colours) == pytest.approx(first, nan_ok=True)  # no dropout
    assert towers.encode_image(torch.rand(4, 3, 8, 8)).requires_grad


@pytest.mark.filterwarnings("default:.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_ends_in_one_line_and_the_mode_comes_back(tmp_path, colour_blind, num_workers):
    samples = [
        ("good", {"png": picture("red"), "cls": b"0"}),
        ("good_too", {"png": picture("red"), "cls": b"0"}),
        ("bad", {"png": b"x", "cls": b"0"}),
    ]
    files = {"classnames": ["red"], "zeroshot_classification_templates": ["{c}"]}
    dataset = load_benchmark_set(str(write_set(tmp_path / "set", [samples], **files)))
    colour_blind.towers.train()
    with pytest.raises(UserError, match="^[^\n]*sample 'bad'[^\n]*$"):
        zero_shot(clip=colour_blind, dataset=dataset, batch_size=1, num_workers=num_workers)
    assert colour_blind.towers.model.dropout.training


@pytest.mark.parametrize("evaluate", [zero_shot, retrieval])
def test_embeddings_that_are_not_finite_are_no_result(colour_blind, colours, evaluate):
    colour_blind.towers.model.gain.data.fill_(float("nan"))
    with pytest.raises(UserError, match="image tower of 'colour-blind'"):
        evaluate(clip=colour_blind, dataset=colours)


def test_settings_without_sense_are_refused_before_the_work(colour_blind, colours):
    with pytest.raises(UserError, match="batch_size=0"):
        zero_shot(clip=colour_blind, dataset=colours, batch_size=0)
    for recall_k in ((), (5, 0)):
        with pytest.raises(ValueError, match="recall_k"):
            retrieval(clip=colour_blind, dataset=colours, recall_k=recall_k)


def test_sets_that_do_not_fit_the_task_are_refused(tmp_path, colour_blind):
    def refusal(**files) -> str:
        root = write_set(tmp_path / str(len(list(tmp_path.iterdir()))), [[]], **files)
        with pytest.raises(UserError) as caught:
            zero_shot(clip=colour_blind, dataset=load_benchmark_set(str(root)))
        return str(caught.value)

    assert "use eval/retrieval.py" in refusal(dataset_type=["retrieval"])
    assert "no classnames.txt" in refusal()
    assert "no zeroshot_classification_templates.txt" in refusal(classnames=["x"])


# ---- results


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
        append_result(path, dataset="d", model="m", pretrained="p", task="t", metrics=metrics)
    first, second = map(json.loads, path.read_text().splitlines())
    assert second["metrics"] == {"acc1": 0.5}
    assert first == {
        "dataset": "d",
        "model": "m",
        "pretrained": "p",
        "task": "t",
        "metrics": {"acc1": 0.25},
        "language": "en",
    }


def test_the_table_lines_up():
    table = format_metrics(
        {
            "emoji": {"acc1": 0.5, "image_retrieval_recall@10": 1.0},
            "unseen": {"acc1": 0.0625, "image_retrieval_recall@10": float("nan")},
        }
    )
    assert table.splitlines() == [
        "            acc1  image R@10",
        "emoji    50.00 %    100.00 %",
        "unseen    6.25 %       nan %",
    ]


def test_an_architecture_without_weights_is_not_scored():
    with pytest.raises(UserError, match="'ViT-B-32' has random weights"):
        refuse_random_weights("ViT-B-32", None)
    refuse_random_weights("ViT-B-32", "openai")
    refuse_random_weights("local-dir:runs/x/model", None)
