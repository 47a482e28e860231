"""Exported classifiers load in this package and in timm; the card states how they were trained; an export never
replaces other files. Also the accuracies of many-, medium- and few-shot classes. Their pushes: test_hub_client.py."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard as HubCard
from safetensors.torch import load_file, save_file
from torch import Tensor

from gkl_vl.errors import UserError
from gkl_vl.evaluation.metrics import shot_accuracies
from gkl_vl.export import hub, push
from gkl_vl.export.cards import ClassifierCard, RunFacts, classifier_usage, for_hub
from gkl_vl.export.hub import export_classifier
from gkl_vl.models.classifiers import Classifier, load_classifier

NAMES = ["resnet8", "torchvision:resnet18", "timm:resnet18"]
CARD = ClassifierCard(
    student="resnet8",
    teacher="hf-hub:org/big",
    made="distilled from `hf-hub:org/big` by gkl",
    data="cifar:train",
    run=RunFacts(
        command="python recipes/cifar_kd.py --pair a-b",
        commit="0123abc",
        metrics=[
            {"step": 7, "model": "teacher", "dataset": "cifar:test", "acc1": 0.5, "acc5": 0.9, "few_acc1": 0.25},
            {
                "step": 7,
                "model": "student",
                "dataset": "cifar:test",
                "acc1": 0.4,
                "acc5": float("nan"),
                "few_acc1": 0.2,
            },
        ],
        steps=7000,
        seed=3,
    ),
)


def changed(**facts) -> RunFacts:
    return dataclasses.replace(CARD.run, **facts)


def pixels() -> Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def trained(name: str) -> Classifier:
    """A model of three classes after a forward pass in training mode, so that its running means have changed."""
    torch.manual_seed(0)
    classifier = load_classifier(name, num_classes=3)
    classifier = dataclasses.replace(classifier, mean=(0.1, 0.2, 0.3), std=(0.6, 0.5, 0.4))
    classifier.model.train()(classifier.prepare(pixels()))
    classifier.model.eval()
    return classifier


@torch.no_grad()
def logits(classifier: Classifier) -> Tensor:
    return classifier.model.eval()(classifier.prepare(pixels()))


@pytest.fixture(scope="module", params=NAMES)
def exported(request, tmp_path_factory) -> tuple[Classifier, Path]:
    classifier, folder = trained(request.param), tmp_path_factory.mktemp("export") / "model"
    export_classifier(classifier=classifier, folder=folder, card=dataclasses.replace(CARD, student=request.param))
    return classifier, folder


# ---- the folder


def test_an_export_loads_unchanged(exported):
    classifier, folder = exported
    again = load_classifier(f"local-dir:{folder}")
    assert (again.name, again.num_classes) == (classifier.name, 3)
    assert (again.mean, again.std) == (classifier.mean, classifier.std)
    torch.testing.assert_close(logits(again), logits(classifier), atol=1e-6, rtol=1e-6)
    assert logits(again).std(dim=0).min() > 1e-4  # the logits differ between images
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # same permissions of card and weights


@pytest.mark.parametrize("name", NAMES)
def test_an_export_carries_its_class_names(tmp_path, name):
    classifier = dataclasses.replace(trained(name), classnames=("cat", "Hund", "poisson d’or"))
    folder = tmp_path / "model"
    export_classifier(classifier=classifier, folder=folder, card=CARD)
    again = load_classifier(f"local-dir:{folder}")
    assert again.classnames == classifier.classnames
    export_classifier(classifier=again, folder=tmp_path / "second", card=CARD)
    assert load_classifier(f"local-dir:{tmp_path / 'second'}").classnames == classifier.classnames


def test_an_export_without_class_names_has_none(exported):
    assert load_classifier(f"local-dir:{exported[1]}").classnames is None


@pytest.mark.parametrize(
    "names, message",
    [
        (["a", "b"], "has 2 names for 3 classes"),
        (["a", "b", 3], "is not a list of names by class index"),
        ("abc", "is not a list of names"),
        ({"0": "a", "2": "c", "3": "d"}, "is not a list of names"),
    ],
)
def test_class_names_that_do_not_fit_the_classes_are_refused(tmp_path, names, message):
    folder = tmp_path / "model"
    export_classifier(classifier=trained("resnet8"), folder=folder, card=CARD)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"label_names": names}))
    with pytest.raises(UserError, match=f"label_names in .*config.json {message}"):
        load_classifier(f"local-dir:{folder}")


def test_timms_names_by_class_index_are_read(tmp_path):
    folder = tmp_path / "model"
    export_classifier(classifier=trained("resnet8"), folder=folder, card=CARD)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"label_names": {"1": "b", "0": "a", "2": "c"}}))
    assert load_classifier(f"local-dir:{folder}").classnames == ("a", "b", "c")


def test_the_usage_code_runs(exported):
    classifier, folder = exported
    names = {}
    exec(classifier_usage(classifier.name, str(folder)), names)
    torch.testing.assert_close(logits(dataclasses.replace(classifier, model=names["model"])), logits(classifier))
    assert ("import timm" in classifier_usage(classifier.name, "x")) == (classifier.name == "timm:resnet18")


def test_timm_loads_a_timm_export_without_this_package(tmp_path):
    classifier = trained("timm:test_resnet")
    export_classifier(classifier=classifier, folder=tmp_path / "model", card=CARD)
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    torch.testing.assert_close(logits(dataclasses.replace(classifier, model=model)), logits(classifier))
    preparation = timm.data.resolve_model_data_config(model)
    assert (tuple(preparation["mean"]), tuple(preparation["std"])) == (classifier.mean, classifier.std)
    assert model.num_classes == 3


@pytest.mark.parametrize("name", ["resnet8", "timm:test_resnet"])
def test_a_model_loaded_from_an_export_exports_completely(tmp_path, name):
    """A student can start from an exported model; its export must not depend on that folder."""
    classifier = trained(name)
    export_classifier(classifier=classifier, folder=tmp_path / "first", card=CARD)
    loaded = load_classifier(f"local-dir:{tmp_path / 'first'}")
    export_classifier(classifier=loaded, folder=tmp_path / "second", card=CARD)
    (tmp_path / "first").rename(tmp_path / "gone")
    again = load_classifier(f"local-dir:{tmp_path / 'second'}")
    assert again.name == name
    torch.testing.assert_close(logits(again), logits(classifier))


@pytest.mark.parametrize("name", ["resnet8", "timm:test_resnet"])
def test_channels_last_models_are_exported(tmp_path, name):
    """safetensors does not store channels_last tensors."""
    classifier = trained(name)
    classifier.model.to(memory_format=torch.channels_last)
    export_classifier(classifier=classifier, folder=tmp_path / "model", card=CARD)
    stored, expected = load_file(tmp_path / "model" / "model.safetensors"), classifier.model.state_dict()
    assert stored.keys() == expected.keys() and all(torch.equal(stored[k], expected[k]) for k in expected)


def test_an_export_replaces_an_earlier_one_completely(tmp_path):
    folder = tmp_path / "run" / "model"
    export_classifier(classifier=trained("resnet8"), folder=folder, card=CARD)
    (folder / "extra.txt").touch()
    export_classifier(
        classifier=trained("timm:test_resnet"),
        folder=folder,
        card=dataclasses.replace(CARD, student="timm:test_resnet"),
    )
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert json.loads((folder / "config.json").read_text())["architecture"] == "test_resnet"
    assert "`timm:test_resnet`" in (folder / "README.md").read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    export_classifier(classifier=trained("resnet8"), folder=folder, card=CARD)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_classifier(
            classifier=trained("resnet8"), folder=folder, card=dataclasses.replace(CARD, run=changed(steps=8))
        )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


FOREIGN = {
    "thesis": {"chapter1.tex": "years of work"},
    "run": {"config.json": '{"pair": "a-b"}', "results.jsonl": "{}"},  # a run folder, the parent of an export
    "transformers": {"config.json": '{"architectures": ["ViT"]}', "model.safetensors": ""},
    "no json": {"config.json": "{", "model.safetensors": ""},
    "no object": {"config.json": "[]", "model.safetensors": ""},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_other_files_are_neither_replaced_nor_pushed(tmp_path, monkeypatch, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="holds files but no exported model"):
        export_classifier(classifier=trained("resnet8"), folder=tmp_path, card=CARD)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files
    monkeypatch.setattr(push.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(push.constants, "ENDPOINT", "http://127.0.0.1:9")  # connection refused
    with pytest.raises(UserError, match="no classifier: push the model/ folder of a run"):
        push.push_to_hub(folder=tmp_path, repo_id="me/tiny", token="hf_x")


@pytest.mark.parametrize("architecture", ["hf-hub:org/repo", "local-dir:{folder}", "local-dir:elsewhere"])
def test_a_folder_that_points_to_another_is_refused(tmp_path, architecture):
    architecture = architecture.format(folder=tmp_path)  # itself: infinite recursion
    config = {"library": "gkl-vl", "architecture": architecture, "num_classes": 3}
    (tmp_path / "config.json").write_text(json.dumps(config | {"mean": [0.5] * 3, "std": [0.5] * 3}))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"'{architecture}' is another folder: write the architecture") as caught:
        load_classifier(f"local-dir:{tmp_path}")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("config", [[], {"library": "gkl-vl", "architecture": 8}])
def test_a_config_with_values_of_other_types_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="config.json(. holds a list where a dict| of .* names no model that is known)"):
        load_classifier(f"local-dir:{tmp_path}", num_classes=3)


# ---- the card


def test_the_card_states_how_it_was_trained():
    text = CARD.render()
    assert "`resnet8`, distilled from `hf-hub:org/big` by gkl with gkl-vl" in text
    assert "```bash\npython recipes/cifar_kd.py --pair a-b\n```" in text
    for fact in ("Steps: 7,000", "Seed: 3", "Training data: `cifar:train`", "Commit of gkl-vl: 0123abc"):
        assert f"- {fact}\n" in text
    assert "| `cifar:test` | `acc1` | 50.0 % | 40.0 % | 80 % |" in text
    assert "| `cifar:test` | `few_acc1` | 25.0 % | 20.0 % | 80 % |" in text
    assert "nan" not in text
    assert classifier_usage("resnet8", "path/to/this/folder") in text and "local-dir:path/to/this/folder" in text
    assert 'load_classifier("hf-hub:me/tiny")' in for_hub(text, "me/tiny", None)


@pytest.mark.parametrize("student, library", [*zip(NAMES, ["gkl-vl", "gkl-vl", "timm"], strict=True)])
def test_card_metadata_is_what_the_hub_reads(student, library):
    data = HubCard(dataclasses.replace(CARD, student=student).render()).data.to_dict()
    assert data["library_name"] == library and data["pipeline_tag"] == "image-classification"
    assert data["base_model"] == "org/big" and data["tags"] == ["knowledge-distillation", "gkl"]


def test_a_card_without_teacher_mentions_none():
    text = dataclasses.replace(
        CARD, teacher=None, made="trained on labels alone", run=changed(metrics=[], commit=None)
    ).render()
    data = HubCard(text).data.to_dict()
    assert "base_model" not in data and data["tags"] == ["gkl"]
    assert "trained on labels alone" in text and "No evaluation was run." in text
    assert "distilled" not in text and "Commit" not in text
    zoo = HubCard(dataclasses.replace(CARD, teacher="timm:resnet34.a1_in1k").render()).data.to_dict()
    assert "base_model" not in zoo  # not a Hub repository


# ---- accuracy by shots


def test_shot_accuracies_equal_a_loops():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(90, 6, generator=generator)
    labels = torch.randint(0, 4, (90,), generator=generator)  # classes 4 and 5 have no test images
    members = {"many": [0, 2], "medium": [1, 3, 4], "few": [5], "none": []}
    groups = {name: torch.tensor([c in classes for c in range(6)]) for name, classes in members.items()}
    accuracies = shot_accuracies(logits=scores, labels=labels, groups=groups)
    expected = {}
    for name in ("many", "medium"):  # the other groups have no test images
        rows = [row for row in range(90) if int(labels[row]) in members[name]]
        hits = [max(range(6), key=lambda c, row=row: float(scores[row, c])) == int(labels[row]) for row in rows]
        expected[f"{name}_acc1"] = sum(hits) / len(rows)
    assert accuracies == pytest.approx(expected, abs=1e-6)
    assert 0 < accuracies["many_acc1"] != accuracies["medium_acc1"] > 0
    assert shot_accuracies(logits=scores, labels=labels, groups={}) == {}
