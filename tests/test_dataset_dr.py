"""MobileCLIP's reinforced data sets: replayed views, embeddings beside their captions, odd samples, refusals, a run."""

import gzip
import io
import json
import pickle
import zlib
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import test_recipes
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image
from small_models import CONFIG
from small_sets import write_shard
from test_teacher_store import loader, pattern, photograph
from torchvision.transforms import autoaugment

from gkl_vl.data.images import BrokenSample
from gkl_vl.data.pair_stream import Position
from gkl_vl.data.pairs import open_source
from gkl_vl.errors import UserError
from gkl_vl.teachers.dataset_dr import DatasetDr, read_dataset_dr
from gkl_vl.teachers.embeddings import stored_teacher

call = test_recipes.call
DIMS, VIEWS, SIDE = [5, 3], 3, 48
NAMES = ["Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast"]
NAMES += ["Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"]
AUGMENTATION = {
    "normalize": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
    "rand_augment": {"enable": True, "p": 1.0},
    "random_resized_crop": {"interpolation": "bicubic", "size": SIDE},
    "to_rgb": {"enable": True},
    "to_tensor": {"enable": True},
}
RELEASED = {
    "model_name": "ViT-L-14,ViT-L-14",
    "num_samples": VIEWS,
    "pretrained": "openai,datacomp_xl_s13b_b90k",
    "reinforce": {"image_augmentation": AUGMENTATION},
}
COMPLETE = RELEASED | {"teacher_dimension": DIMS, "teacher_scale": [70, 60.0]}
BOXES = [[[2, 5, 30, 40], [[0, 0.0], [6, 0.27]]], [[0, 0, 40, 48], [[3, -7.5], [11, 178.5]]], [[9, 1, 20, 17], None]]
"""Parameters of the views of a `pattern`."""


def configuration(folder: Path, content: dict = COMPLETE) -> str:
    path = folder / "dr.json"
    path.write_text(json.dumps(content))
    return str(path)


def with_views(**transforms: dict) -> dict:
    """The configuration with these transforms beside or in place of the released ones."""
    return COMPLETE | {"reinforce": {"image_augmentation": AUGMENTATION | transforms}}


def unit(text: str) -> torch.Tensor:
    """Embeddings of both teachers that tell of what they are, side by side."""
    draw = torch.Generator().manual_seed(zlib.crc32(text.encode()))
    return torch.cat([F.normalize(torch.randn(dim, generator=draw), dim=0) for dim in DIMS])


def captions(number: int) -> tuple[str, list[str]]:
    return f"a real one {number}", [f"synthetic {letter} {number}" for letter in "abc"]


def arrays_of(number: int, *, synthetic: str | None = None) -> dict[str, torch.Tensor]:
    """With `synthetic` the synthetic captions have an array of their own, of this name."""
    real, others = captions(number)
    image = torch.stack([unit(f"view {view} of {number}") for view in range(VIEWS)])
    text, syn = unit(real)[None], torch.stack([unit(caption) for caption in others])
    if synthetic is None:
        return {"image_emb": image, "text_emb": torch.cat([text, syn])}
    return {"image_emb": image, "text_emb": text, f"{synthetic}_emb": syn}


def npz(arrays: dict) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def pth_gz(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return gzip.compress(file.getvalue())


def sample(number: int, **changes: object) -> dict[str, bytes]:
    """The members of a sample as DataCompDR has them; None in place of a member leaves it out."""
    real, synthetic = captions(number)
    parameters = changes.pop("parameters", BOXES)
    members = {
        "url_txt": b"https://host.org/x.jpg",
        "syn_json": json.dumps({"syn_text": synthetic}).encode(),
        "paug_json": json.dumps({"param_aug": json.dumps(parameters)}).encode(),
        "npz": npz({name: rows.numpy() for name, rows in arrays_of(number).items()}),
        "json": b'{"uid": "0", "sha256": "0"}',
        "jpg": pattern(number),
        "txt": f" {real}\n".encode(),
    }
    members |= changes
    return {name.replace("_", "."): content for name, content in members.items() if content is not None}


def opened(folder: Path, samples: list[dict], name: str = "syn_text", content: dict = COMPLETE):
    """The store, and the source with its members."""
    write_shard(folder / "0.tar", [(f"k{number}", members) for number, members in enumerate(samples)])
    store = read_dataset_dr(configuration(folder, content))
    source = open_source(f"{folder}/0.tar", columns=("jpg", "txt", f"syn.json.{name}"))
    return store, store.with_embeddings(source)


def outputs_of(store: DatasetDr, source, view: int = 0, captions: tuple = (0,)) -> dict[str, torch.Tensor]:
    return store.of_pair(next(source.pairs.read(0)), view, captions)


# ---- views


class RecordedCrop(T.RandomResizedCrop):
    def get_params(self, *arguments):
        self.box = list(T.RandomResizedCrop.get_params(*arguments))
        return self.box


def test_a_view_is_torchvisions_own_to_the_last_bit_for_every_operation(monkeypatch, tmp_path):
    """torchvision's classes draw, apply and are recorded; the parameters take the way through the shard's files."""
    seen: set[str] = set()
    steps: list[list] = []
    apply = autoaugment._apply_op

    def recording(image, name, magnitude, **options):
        steps.append([NAMES.index(name), magnitude])
        return apply(image, name, magnitude, **options)

    monkeypatch.setattr(autoaugment, "_apply_op", recording)
    image, expected, parameters = photograph(), [], []
    crop, rand_augment = RecordedCrop(SIDE, interpolation=T.InterpolationMode.BICUBIC), T.RandAugment()
    torch.manual_seed(0)
    for _ in range(60):
        steps.clear()
        expected.append(T.functional.pil_to_tensor(rand_augment(crop(image))))
        parameters.append([crop.box, list(steps)])
        seen |= {NAMES[index] for index, _ in steps}
    assert seen == set(NAMES)
    file = io.BytesIO()
    image.save(file, "png")
    views = torch.stack([unit(str(view)) for view in range(60)]).numpy()
    arrays = npz({"image_emb": views, "text_emb": views[:4]})
    samples = [sample(0, parameters=parameters, npz=arrays, jpg=file.getvalue())]
    store, source = opened(tmp_path, samples, content=COMPLETE | {"num_samples": 60})
    for view in range(60):
        found = outputs_of(store, source, view)["image"]
        assert found.dtype == torch.uint8 and torch.equal(found, expected[view]), parameters[view]


def test_a_view_of_another_size_has_the_same_box_and_the_same_share_of_a_shift(tmp_path):
    parameters = [[[3, 7, 50, 60], [[5, -9.0], [1, 0.09]]], [[0, 0, 60, 80], [[3, 13.05], [4, -6.5]]], BOXES[0]]
    file = io.BytesIO()
    photograph().save(file, "png")
    store, source = opened(tmp_path, [sample(0, parameters=parameters, jpg=file.getvalue())])
    for view in (0, 1):
        small = outputs_of(store, source, view)["image"].float()
        large = outputs_of(store.at_size(2 * SIDE), source, view)["image"].float()
        assert large.shape == (3, 2 * SIDE, 2 * SIDE)
        assert (F.avg_pool2d(large, 2) - small).abs().mean() < 3
    assert [int((picture == 0).all(dim=0).all(dim=0).sum()) for picture in (small, large)] == [13, 26]
    assert [int((picture == 0).all(dim=0).all(dim=1).sum()) for picture in (small, large)] == [6, 12]


def test_a_box_is_of_the_image_as_it_was_embedded(tmp_path):
    """Not turned upright, and without its transparency: open_clip decodes to RGBA and then to RGB."""
    pixels = photograph().convert("RGBA")
    pixels.putalpha(90)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    pixels.save(file, "png", exif=exif)
    parameters = [[[10, 20, SIDE, SIDE], None]] * VIEWS
    store, source = opened(tmp_path, [sample(0, parameters=parameters, jpg=file.getvalue())])
    expected = T.functional.pil_to_tensor(photograph())[:, 10 : 10 + SIDE, 20 : 20 + SIDE]
    assert torch.equal(outputs_of(store, source)["image"], expected)


def test_a_flip_is_replayed_between_crop_and_operations(tmp_path):
    flipped = [[BOXES[0][0], flips, [[4, 7.0]]] for flips in (True, False, None)]
    content = with_views(random_horizontal_flip={"p": 0.5})
    store, source = opened(tmp_path, [sample(0, parameters=flipped)], content=content)
    turned, plain, skipped = (outputs_of(store, source, view)["image"] for view in range(3))
    assert torch.equal(plain, skipped) and torch.equal(turned, plain.flip(2)) and not torch.equal(turned, plain)


# ---- embeddings


@pytest.mark.parametrize("name", [None, "syn_text_dfn_mscoco38k"])
@pytest.mark.parametrize("kind", ["npz", "pth.gz"])
def test_each_teacher_has_its_part_of_the_embeddings_of_its_view_and_its_caption(tmp_path, kind, name):
    """DataCompDR's single array of captions, and DFNDR's one for each list; parameters as a text, and as a list."""
    samples = []
    for number in range(3):
        arrays, lists = arrays_of(number, synthetic=name), {name or "syn_text": captions(number)[1]}
        lists |= {"another": ["without"]} if name else {}
        changes: dict = {"syn_json": json.dumps(lists).encode()}
        if kind == "pth.gz":
            packed = pth_gz({part: rows.bfloat16() for part, rows in arrays.items()})
            changes |= {"npz": None, "pth_gz": packed, "paug_json": json.dumps({"param_aug": BOXES}).encode()}
        else:
            changes["npz"] = npz({part: rows.numpy() for part, rows in arrays.items()})
        samples.append(sample(number, **changes))
    store, source = opened(tmp_path, samples, name or "syn_text")
    store.check(source)
    for number, pair in enumerate(source.pairs.read(0)):
        real, synthetic = captions(number)
        for view in range(VIEWS):
            found = store.of_pair(pair, view, [2, 0])
            for part, wanted in (
                ("teacher_image", unit(f"view {view} of {number}")),
                ("teacher_text", torch.stack([unit(synthetic[1]), unit(real)])),
            ):
                wanted = wanted.bfloat16().float() if kind == "pth.gz" else wanted
                for row, suffix in zip(wanted.split(DIMS, dim=-1), ("", ".1"), strict=True):
                    assert torch.equal(found[part + suffix], row)
        assert set(store.of_pair(pair, 0, [])) == {"image", "teacher_image", "teacher_image.1"}
    embedded = stored_teacher(store.teachers, torch.device("cpu"))(found)
    assert embedded["teacher_text.1"].norm(dim=-1).tolist() == pytest.approx([1, 1])
    assert [float(embedded[f"teacher_logit_scale{suffix}"]) for suffix in ("", ".1")] == [70, 60]


def test_a_stream_has_a_view_each_epoch_and_goes_on_where_it_stopped(tmp_path):
    store, source = opened(tmp_path, [sample(number) for number in range(4)])
    store = store.at_size(16)
    (tmp_path / "sizes.json").write_text('{"0.tar": 4}')
    source = store.with_embeddings(open_source(f"{tmp_path}/0.tar", columns=("jpg", "txt", "syn.json.syn_text")))
    pairs = {pair.key: pair for pair in source.pairs.read(0)}
    whole = list(islice(iter(loader(source, store, captions=2)), 8))
    for step, batch in enumerate(whole):
        for row, key in enumerate(batch["keys"]):
            wanted = store.of_pair(pairs[key], step // 2 % VIEWS, [])
            assert torch.equal(batch["image"][row], wanted["image"])
            assert torch.equal(batch["teacher_image.1"][row], wanted["teacher_image.1"])
    assert whole[0]["image"].shape == (2, 3, 16, 16) and whole[0]["teacher_text"].shape == (2, 2, 5)
    for workers in (0, 2):
        first = loader(source, store, captions=2, workers=workers)
        before = list(islice(iter(first), 3))
        start = Position.of(json.loads(json.dumps(first.position())))
        after = list(islice(iter(loader(source, store, captions=2, workers=workers, start=start)), 3))
        through = list(islice(iter(loader(source, store, captions=2, workers=workers)), 6))
        for one, other in zip([*before, *after], through, strict=True):
            assert one["keys"] == other["keys"]
            assert all(torch.equal(one[n], other[n]) for n in one if isinstance(one[n], torch.Tensor))


# ---- odd samples


class Touches:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


ARRAYS = arrays_of(0)
BROKEN = {
    "no .paug.json": {"paug_json": None},
    "no .npz and no .pth.gz": {"npz": None},
    "no .txt: pack it": {"txt": None},
    "no JSON": {"paug_json": b'{"param_aug": [['},
    "its .paug.json is damaged (Expecting value": {"paug_json": b'{"param_aug": "H4sIA"}'},
    "it has no list of parameters": {"paug_json": b'["param_aug"]'},
    "a crop is no box": {"parameters": [[[0, 0, 9.5, 9], None]] * VIEWS},
    "a crop of 9x39 at (5, 2) in an image of 48x40: it needs": {"parameters": [[[2, 5, 39, 9], None]] * VIEWS},
    "a crop of 44x9 at (5, 2)": {"parameters": [[[2, 5, 9, 44], None]] * VIEWS},
    "a crop of 9x9 at (-1, 0)": {"parameters": [[[0, -1, 9, 9], None]] * VIEWS},
    "a magnitude is no number": {"parameters": [[[0, 0, 9, 9], [[2, float("inf")]]]] * VIEWS},
    "(cannot unpack": {"parameters": [[[0, 0, 9, 9], [2]]] * VIEWS},
    "embeddings cannot be read (File is not a zip": {"npz": npz({"image_emb": np.zeros(3)})[:-9]},
    "embeddings cannot be read (Object arrays": {"npz": npz({"image_emb": np.array([{}], dtype=object)})},
    "embeddings cannot be read (Weights only": {"npz": None, "pth_gz": pth_gz({"image_emb": Touches()})},
    "embeddings cannot be read (Not a gzipped": {"npz": None, "pth_gz": b"none"},
    "no image_emb among its embeddings, only text_emb": {"npz": npz({"text_emb": np.zeros((4, 8))})},
    "embeddings that are not finite": {"npz": npz(ARRAYS | {"image_emb": ARRAYS["image_emb"] * np.nan})},
    "embeddings of the shape [3, 8] for 4 captions": {"npz": npz(ARRAYS | {"text_emb": ARRAYS["text_emb"][:3]})},
    "text embeddings of 5 dimensions": {"npz": npz(ARRAYS | {"text_emb": ARRAYS["text_emb"][:, :5]})},
    "its .syn.json is damaged": {"syn_json": b'{"syn_text": ["a", "b"], "more": [3]}'},
    "image: cannot identify": {"jpg": b"none"},
    "no .jpg member": {"jpg": None},
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_sample_without_its_members_or_with_damaged_ones_is_broken(tmp_path, monkeypatch, message):
    monkeypatch.chdir(tmp_path)
    store, source = opened(tmp_path, [sample(0, **BROKEN[message]), sample(1)])
    with pytest.raises(BrokenSample) as error:
        outputs_of(store, source)
    assert message in str(error.value)
    assert not Path("executed").exists()
    store.check(source)


# ---- refusals

CROP = AUGMENTATION["random_resized_crop"]
CONFIGURATIONS = [
    (RELEASED, "lacks teacher_dimension, teacher_scale: add them as docs/teachers.md, MobileCLIP's DR folders, says"),
    (AUGMENTATION, "lacks model_name, num_samples"),
    (COMPLETE | {"reinforce": {}}, "is damaged ('image_augmentation')"),
    (COMPLETE | {"teacher_scale": [70, 0]}, "must be numbers above 0"),
    (COMPLETE | {"num_samples": True}, "must be numbers above 0"),
    (COMPLETE | {"teacher_dimension": [8]}, "has 2 of model_name, 2 of pretrained, 1 of teacher_dimension"),
    (
        with_views(mixup={"alpha": 1.0}, cutmix={}),
        "views with mixup, cutmix cannot be replayed, only those with to_rgb,",
    ),
    (with_views(random_erase={"p": 0.25}), "views with random_erase cannot be replayed"),
    (with_views(rand_augment={"fill": 3}), "views with fill in rand_augment cannot be replayed"),
    (with_views(random_resized_crop={"enable": False, "size": 9}), "views without random_resized_crop and its size"),
    (with_views(random_resized_crop={"size": [48, 32]}), "views of the size [48, 32] cannot be replayed, only square"),
    (with_views(random_resized_crop=CROP | {"interpolation": "cubic"}), "views resized by 'cubic' cannot be replayed"),
]


@pytest.mark.parametrize(("content", "message"), CONFIGURATIONS, ids=[message for _, message in CONFIGURATIONS])
def test_a_configuration_of_views_that_cannot_be_replayed_is_refused(tmp_path, content, message):
    with pytest.raises(UserError) as error:
        read_dataset_dr(configuration(tmp_path, content))
    assert message in str(error.value) and "\n" not in str(error.value)


OTHERS = [
    (
        {"num_samples": 9},
        {},
        "says 9 views and 5 + 3 dimensions, and 'k0' has 3 views and embeddings of the shape [3, 8]",
    ),
    ({"teacher_dimension": [5, 4]}, {}, "says 3 views and 5 + 4 dimensions"),
    ({}, {"parameters": BOXES[:2]}, "'k0' has 2 views and embeddings of the shape [3, 8]"),
    ({"teacher_dimension": [3, 5]}, {}, "the embeddings of 'k0' have lengths of "),
    ({}, {"parameters": [[[0, 0, 9, 9], [[14, 0.0]]]] * 3}, "operation 14 of rand_augment cannot be replayed, it has"),
    (
        {},
        {"parameters": [[[0, 0, 9, 9]]] * 3},
        "has the random transforms random_resized_crop, rand_augment, and a view",
    ),
]


@pytest.mark.parametrize(("changes", "members", "message"), OTHERS, ids=[message for _, _, message in OTHERS])
def test_samples_of_another_configuration_are_refused_before_the_run(tmp_path, changes, members, message):
    store, source = opened(tmp_path, [sample(0, **members)], content=COMPLETE | changes)
    with pytest.raises(UserError) as error:
        store.check(source)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_caption_without_embedding_and_other_sources_are_refused(tmp_path):
    store, source = opened(tmp_path, [sample(0, json=b'{"alt": "another"}')])
    other = store.with_embeddings(open_source(f"{tmp_path}/0.tar", columns=("jpg", "alt")))
    with pytest.raises(UserError, match="'k0' has no embedding of its caption 'another': read the captions that were"):
        store.check(other)
    (tmp_path / "t.csv").write_text("filepath,title\nx.png,a\n")
    with pytest.raises(UserError, match=r"t.csv' is not of shards, whose samples may have .txt, .syn.json, .paug.json"):
        store.check(open_source(f"{tmp_path}/t.csv"))
    with pytest.raises(UserError, match="has embeddings of captions and none of class prompts: train with"):
        store.check(replace(source, captioned=False))


def test_a_store_and_its_source_are_picklable(tmp_path):
    store, source = opened(tmp_path, [sample(0)])
    again = pickle.loads(pickle.dumps((store, source)))
    assert torch.equal(outputs_of(*again)["image"], outputs_of(store, source)["image"])


# ---- the recipe


def test_a_run_on_a_reinforced_data_set_has_two_teachers_and_views_of_the_students_size(tmp_path, call, monkeypatch):
    sizes, of_pair = [], DatasetDr.of_pair

    def recording(*arguments):
        outputs = of_pair(*arguments)
        sizes.append(outputs["image"].shape[-1])
        return outputs

    monkeypatch.setattr(DatasetDr, "of_pair", recording)
    (tmp_path / "student.json").write_text(json.dumps(CONFIG))
    opened(tmp_path, [*(sample(number) for number in range(8)), sample(8, npz=None)])
    flags = ["--student", "student.json", "--train-data", "0.tar", "--columns", "jpg", "txt", "syn.json.syn_text"]
    flags += ["--teacher-store", "dr.json", "--batch-size", "4", "--steps", "6", "--workers", "0"]
    flags += ["--captions-per-image", "2", "--teacher-scale", "9", "8"]
    code, out, errors = call(*flags, "--output-dir", "run")
    assert code == 0, errors
    assert sizes[0] == SIDE and set(sizes[1:]) == {16}  # the first of all is compared before the run
    assert "distilled from ViT-L-14 (openai) + ViT-L-14 (datacomp_xl_s13b_b90k)" in out
    last = json.loads(Path("run/results.jsonl").read_text().splitlines()[-1])
    assert {"train/mimicry.0", "train/mimicry.1"} <= set(last) and last["train/skipped"] >= 2
    assert [last[f"train/teacher_logit_scale.{k}"] for k in (0, 1)] == [9, 8]
    assert "- Teachers: `ViT-L-14 (openai)`, `ViT-L-14 (datacomp" in Path("run/model/README.md").read_text()

    code, _, errors = call(*flags, "--teacher-store", "folder", "--output-dir", "third")
    assert code == 2 and "--teacher-store dr.json folder: dr.json has views of its own: name it alone" in errors
    configuration(tmp_path, with_views(cutmix={}))
    code, _, errors = call(*flags, "--output-dir", "third")
    assert code == 2 and "--teacher-store dr.json: views with cutmix cannot be replayed" in errors
    assert not Path("third").exists()
