"""A CLIP under mteb has the scores of this package's own harness, on tasks built from bundled emoji."""

import io
import re
import sys
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from small_models import tiny_clip
from small_sets import write_set
from torch.utils.data import DataLoader

from gkl_vl.data.images import decode
from gkl_vl.errors import UserError
from gkl_vl.evaluation.benchmark import measure, metrics_of
from gkl_vl.evaluation.embed import Embedder, embed_texts
from gkl_vl.evaluation.mteb_encoder import MtebEncoder
from gkl_vl.evaluation.sets import load_benchmark_set
from gkl_vl.models.clip import Clip, load_clip

IMAGES = 24
PROMPT = "an emoji of {c}"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def mteb(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTEB_CACHE", str(tmp_path_factory.mktemp("mteb")))  # which the import creates
        yield pytest.importorskip("mteb", minversion="2.26")


@pytest.fixture
def clip(tmp_path) -> Clip:
    return tiny_clip(tmp_path)


@pytest.fixture(scope="module")
def emoji():
    """Encoded images with their captions and class names."""
    dataset = load_benchmark_set("emoji")
    records = islice(dataset.records("cls", "txt"), IMAGES)
    return [(record.read(), record.targets["txt"], dataset.classnames[record.targets["cls"]]) for record in records]


def images_of(files: list[bytes], **columns: list) -> Dataset:
    content = {"image": [{"bytes": file, "path": None} for file in files], **columns}
    kinds = {name: Value("string" if isinstance(column[0], str) else "int64") for name, column in columns.items()}
    return Dataset.from_dict(content, features=Features({"image": ImageFeature(), **kinds}))


def metadata(name: str, **settings) -> dict:
    shared = {"dataset": {"path": "none", "revision": "1"}, "description": name, "modalities": ["image", "text"]}
    return {**shared, "name": name, "eval_langs": ["eng-Latn"], **settings}


def zero_shot_task(emoji):
    from mteb.abstasks import AbsTaskZeroShotClassification
    from mteb.abstasks.task_metadata import TaskMetadata

    class EmojiZeroShot(AbsTaskZeroShotClassification):
        metadata = TaskMetadata(
            **metadata("EmojiZeroShot", type="ZeroShotClassification", category="i2t", main_score="accuracy")
        )

        def get_candidate_labels(self):
            return [PROMPT.replace("{c}", name) for _, _, name in emoji]

    task = EmojiZeroShot()
    task.dataset = {"test": images_of([file for file, _, _ in emoji], label=list(range(len(emoji))))}
    task.data_loaded = True
    return task


def retrieval_task(emoji):
    """Text to image: the captions, of which an image has several, are the queries."""
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class EmojiRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            **metadata("EmojiRetrieval", type="Any2AnyRetrieval", category="t2i", main_score="hit_rate_at_1")
        )

    captions = [(f"q{i}_{j}", text, f"d{i}") for i, (_, own, _) in enumerate(emoji) for j, text in enumerate(own)]
    task = EmojiRetrieval()
    split = {
        "queries": Dataset.from_dict(
            {"id": [key for key, _, _ in captions], "text": [text for _, text, _ in captions]}
        ),
        "corpus": images_of([file for file, _, _ in emoji], id=[f"d{i}" for i in range(len(emoji))]),
        "relevant_docs": {key: {owner: 1} for key, _, owner in captions},
        "top_ranked": None,
    }
    task.dataset, task.data_loaded = {"default": {"test": split}}, True
    return task


def test_the_code_of_the_page_has_the_scores_of_the_own_harness(mteb, emoji, tmp_path, monkeypatch):
    samples = [
        (f"s{i:02d}", {"webp": file, "cls": str(i).encode(), "txt": "\n".join(captions).encode()})
        for i, (file, captions, _) in enumerate(emoji)
    ]
    names = [name for _, _, name in emoji]
    folder = write_set(tmp_path / "set", [samples], classnames=names, zeroshot_classification_templates=[PROMPT])
    own = metrics_of(
        measure(
            Embedder(clip=load_clip("bundled")),
            load_benchmark_set(str(folder)),
            ["zeroshot_classification", "zeroshot_retrieval"],
        )
    )
    zero_shot, retrieval = scores_of_the_page(
        mteb, [zero_shot_task(emoji), retrieval_task(emoji)], monkeypatch, tmp_path
    )
    assert 0.2 < own["acc1"] < 1 and 0.2 < own["image_retrieval_recall@1"] < 1
    assert zero_shot["accuracy"] == pytest.approx(own["acc1"], abs=1e-6)
    for k in (1, 5, 10):  # mteb rounds to five digits
        assert retrieval[f"recall_at_{k}"] == pytest.approx(own[f"image_retrieval_recall@{k}"], abs=1e-5)
        assert retrieval[f"hit_rate_at_{k}"] == pytest.approx(own[f"image_retrieval_recall@{k}"], abs=1e-5)
    stored = {path.name for path in (tmp_path / "results").rglob("gkl_vl__bundled/*/*.json")}
    assert stored == {"EmojiZeroShot.json", "EmojiRetrieval.json", "model_meta.json"}


def scores_of_the_page(mteb, tasks: list, monkeypatch, folder: Path) -> list[dict]:
    """Runs the code of docs/mteb.md on these tasks and the bundled teacher, in an empty folder."""
    page = (Path(__file__).parents[1] / "docs" / "mteb.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert code.count("runs/NAME") == 1
    monkeypatch.chdir(folder)
    monkeypatch.setattr(mteb, "get_tasks", lambda **names: tasks)
    variables: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of classes without a prediction
        exec(code.replace("runs/NAME", "bundled"), variables)
    return [result.scores["test"][0] for result in variables["results"].task_results]


def encode(encoder: MtebEncoder, dataset: Dataset, **settings) -> torch.Tensor:
    def collate(rows: list[dict]) -> dict[str, list]:
        return {name: [row[name] for row in rows] for name in rows[0]}

    task = SimpleNamespace(name="SomeTask")
    loader = DataLoader(dataset, batch_size=2, collate_fn=collate)
    return encoder.encode(loader, task_metadata=task, hf_split="test", hf_subset="default", **settings)


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def odd_images() -> list[bytes]:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    palette = Image.fromarray(pixels[..., :3]).quantize(8)
    palette.info["transparency"] = 0
    grey = Image.fromarray(random.integers(0, 65536, (16, 16), dtype=np.uint16))
    return [encoded(image) for image in (Image.fromarray(pixels), palette, grey)]


def test_images_are_decoded_by_the_rules_of_this_package(mteb, clip):
    files = odd_images()
    with torch.inference_mode():
        pixels = torch.stack([clip.image_transform()(decode(file)) for file in files])
        expected = clip.towers.encode_image(pixels)
    torch.testing.assert_close(encode(MtebEncoder(clip), images_of(files)), expected)


def test_an_image_with_a_text_has_the_sum_of_both_unit_embeddings(mteb, clip):
    encoder, files, texts = MtebEncoder(clip), odd_images(), ["one", "two", "one"]
    image = encode(encoder, images_of(files))
    text = encode(encoder, Dataset.from_dict({"text": texts}), batch_size=1)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text, embed_texts(Embedder(clip=clip), texts))
    torch.testing.assert_close(encode(encoder, images_of(files, text=texts)), image + text)


def test_it_has_the_interface_of_an_encoder_alone(mteb, clip):
    encoder = MtebEncoder(clip)
    protocols = (mteb.models.EncoderProtocol, mteb.models.SearchProtocol, mteb.models.CrossEncoderProtocol)
    assert [isinstance(encoder, protocol) for protocol in protocols] == [True, False, False]
    one, other = torch.randn(2, 5), torch.randn(3, 5).numpy()
    cosines = torch.nn.functional.cosine_similarity(one[:, None], torch.tensor(other), dim=2)
    torch.testing.assert_close(encoder.similarity(one, other), cosines)
    torch.testing.assert_close(encoder.similarity_pairwise(one, other[:2]), cosines.diagonal())


def test_results_are_stored_under_the_weights_and_a_name_of_two_parts(mteb, clip):
    before, again = (MtebEncoder(clip).mteb_model_meta for _ in range(2))
    with torch.no_grad():
        next(clip.towers.parameters()).view(-1)[0] += 1
    after = MtebEncoder(clip).mteb_model_meta
    assert before.revision == again.revision != after.revision
    assert before.name.startswith("gkl_vl/") and before.name.endswith("tiny.json") and before.name.count("/") == 1
    assert MtebEncoder(replace(clip, name="hf-hub:org/student")).mteb_model_meta.name == "org/student"
    assert (before.embed_dim, before.max_tokens, before.modalities) == (12, 16, ["image", "text"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"audio": ["a"]}, "SomeTask, split test has neither images nor texts"),
        ({"image": [None]}, r"SomeTask, split test: an image cannot be decoded \(image: no image\)"),
    ],
)
def test_inputs_that_cannot_be_embedded_are_errors(mteb, clip, columns, message):
    with pytest.raises(UserError, match=message):
        encode(MtebEncoder(clip), Dataset.from_dict(columns))


def test_embeddings_that_are_not_finite_are_errors(mteb, clip):
    encoder = MtebEncoder(clip)
    with torch.no_grad():
        for parameter in clip.towers.image_parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(UserError, match="image tower of .* not finite"):
        encode(encoder, images_of(odd_images()))


def test_an_architecture_without_weights_is_an_error(mteb):
    with pytest.raises(UserError, match=r"'ViT-T-16' has random weights.*load_clip"):
        MtebEncoder("ViT-T-16")


def test_without_mteb_the_error_names_what_to_install(monkeypatch, clip):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(UserError, match=r"needs mteb.*pip install 'gkl-vl\[mteb\]'"):
        MtebEncoder(clip)
