"""Every image and text is embedded once, in the order of the set, with the same bits for any number of processes; the
cache returns what would be computed, or it is computed again; evaluation does not change the model or random states."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import run_ranks
from small_models import colour_blind_clip, tiny_clip
from small_sets import colour_set, picture, write_set

from gkl_vl import disk_cache
from gkl_vl.errors import UserError
from gkl_vl.evaluation import embed
from gkl_vl.evaluation.embed import Embedder, embed_images, embed_texts, top_names, zero_shot_classifier
from gkl_vl.evaluation.sets import load_benchmark_set
from gkl_vl.models.clip import BUNDLED_TEACHER, Clip, as_clip, load_clip


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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Clip:
    return tiny_clip(tmp_path_factory.mktemp("model"))


CLASSES = ["cat", "dog {x}", "red panda", "emu"]
TEMPLATES = ["a photo of a {c}.", "{c}", "{c} or {c}?"]
CUPL = {name: [f"{name} {index}" for index in range(1 + index)] for index, name in enumerate(CLASSES)}


@pytest.mark.parametrize("templates", [TEMPLATES, CUPL], ids=["templates", "cupl"])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_classifier_is_clip_benchmarks_whatever_the_batch(tiny, templates, batch_size):
    embedder = Embedder(clip=tiny, batch_size=batch_size)
    ours = zero_shot_classifier(embedder, classnames=CLASSES, templates=templates)
    with torch.no_grad():
        theirs = clip_benchmark_classifier(tiny.towers.encode_text, tiny.tokenize, CLASSES, templates)
    torch.testing.assert_close(ours, theirs.T, rtol=0, atol=1e-6)  # fp32 rounding of unit vectors


def test_the_classifier_is_open_clips(tiny):
    theirs = open_clip.build_zero_shot_classifier(
        tiny.towers.model, tiny.tokenize, CLASSES, [template.replace("{c}", "{0}") for template in TEMPLATES]
    )
    ours = zero_shot_classifier(Embedder(clip=tiny, batch_size=7), classnames=CLASSES, templates=TEMPLATES)
    torch.testing.assert_close(ours, theirs.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("templates", "message"), [(["a cat"], "'a cat'"), ({"cat": ["x"], "emu": []}, "'emu'")])
def test_prompts_without_a_class_are_refused(tiny, templates, message):
    with pytest.raises(UserError, match=message):
        zero_shot_classifier(Embedder(clip=tiny), classnames=["cat", "emu"], templates=templates)


def test_equal_texts_are_embedded_once(tiny):
    seen = []
    handle = tiny.towers.model.transformer.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    rows = embed_texts(Embedder(clip=tiny, batch_size=2), ["a", "b", "a", "c", "a"])
    handle.remove()
    assert seen == [2, 1]
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[0], rows[4]) and not torch.equal(rows[0], rows[1])
    with torch.no_grad():
        expected = F.normalize(tiny.towers.encode_text(tiny.tokenize(["a", "b", "a", "c", "a"])), dim=-1)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-6)


@pytest.fixture
def colour_blind() -> Clip:
    return colour_blind_clip()


@pytest.fixture
def colours(tmp_path):
    order = ["red", "green", "blue", "blue", "red", "red", "green"]
    return load_benchmark_set(str(colour_set(tmp_path / "colours", order)))


@pytest.mark.filterwarnings("default:.*fork:DeprecationWarning")
@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 0), (100, 0), (2, 1), (1, 2), (3, 2)])
def test_rows_keep_the_order_of_the_set(colour_blind, colours, batch_size, num_workers):
    embedder = Embedder(clip=colour_blind, batch_size=batch_size, num_workers=num_workers)
    images = embed_images(embedder, colours, "cls", "txt")
    assert images.targets["cls"] == [0, 1, 2, 2, 0, 0, 1] and images.broken == 0
    assert images.targets["txt"][2] == ["something blue", "a blue square"]
    assert images.rows.argmax(dim=1).tolist() == [0, 1, 1, 1, 0, 0, 1]  # blue looks green
    torch.testing.assert_close(images.rows.norm(dim=1), torch.ones(7))


def test_evaluation_changes_neither_the_model_nor_random_states(colour_blind, colours):
    towers = colour_blind.towers
    towers.train()
    towers.model.norm.eval()  # a student with frozen statistics
    weights = {name: value.clone() for name, value in towers.state_dict().items()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    embedder = Embedder(clip=colour_blind)
    first = embed_images(embedder, colours).rows
    text = embed_texts(embedder, ["red", "green"])
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert [towers.training, towers.model.dropout.training, towers.model.norm.training] == [True, True, False]
    assert all(torch.equal(value, weights[name]) for name, value in towers.state_dict().items())
    assert torch.equal(embed_images(embedder, colours).rows, first)  # no dropout
    assert towers.encode_image(torch.rand(4, 3, 8, 8)).requires_grad
    assert not text.is_inference()  # so that it can be used with autograd


def broken_set(folder, *, good: int):
    samples = [(f"good{i}", {"png": picture("red"), "cls": b"0"}) for i in range(good)]
    samples.insert(1, ("bad", {"png": b"x", "cls": b"1"}))
    files = {"classnames": ["red", "green"], "zeroshot_classification_templates": ["{c}"]}
    return load_benchmark_set(str(write_set(folder, [samples], **files)))


@pytest.mark.filterwarnings("default:.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_is_a_one_line_error_and_the_mode_is_restored(tmp_path, colour_blind, num_workers):
    colour_blind.towers.train()
    embedder = Embedder(clip=colour_blind, batch_size=1, num_workers=num_workers)
    message = "^1 of 3 images[^\n]*--max_broken allows a share of 0.001[^\n]*sample 'bad'[^\n]*$"
    with pytest.raises(UserError, match=message):
        embed_images(embedder, broken_set(tmp_path / "set", good=2), "cls")
    assert colour_blind.towers.model.dropout.training


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_few_broken_images_are_left_out_and_counted(tmp_path, colour_blind, batch_size):
    embedder = Embedder(clip=colour_blind, batch_size=batch_size, max_broken=0.25)
    images = embed_images(embedder, broken_set(tmp_path / "set", good=3), "cls")
    assert (images.broken, len(images.rows), images.targets["cls"]) == (1, 3, [0, 0, 0])
    with pytest.raises(UserError, match="1 of 4 images"):
        embed_images(replace(embedder, max_broken=0.24), broken_set(tmp_path / "again", good=3), "cls")
    with pytest.raises(UserError, match="1 of 1 images"):  # none would remain
        embed_images(replace(embedder, max_broken=1), broken_set(tmp_path / "alone", good=0), "cls")


def test_embeddings_that_are_not_finite_are_refused(colour_blind, colours):
    colour_blind.towers.model.gain.data.fill_(float("nan"))
    with pytest.raises(UserError, match="image tower of 'colour-blind'"):
        embed_images(Embedder(clip=colour_blind), colours)


def test_a_batch_size_of_0_is_refused(colour_blind, colours):
    with pytest.raises(UserError, match="batch_size=0"):
        embed_images(Embedder(clip=colour_blind, batch_size=0), colours)


def test_amp_runs_the_towers_under_autocast(tiny, colours):
    whole, half = (embed_images(Embedder(clip=tiny, amp=amp), colours).rows for amp in (False, True))
    assert 0 < (whole - half).abs().max() < 0.05 and half.dtype == torch.float32


def emoji_part(rank: int, world_size: int, folder: str) -> tuple:
    clip = load_clip(BUNDLED_TEACHER)
    dataset = load_benchmark_set(folder)
    embedder = Embedder(clip=clip, batch_size=2)
    images = embed_images(embedder, dataset, "cls")
    return images.rows, images.targets, embed_texts(embedder, ["red", "green", "a blue square", "red", "x"])


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.usefixtures("one_thread")
def test_processes_share_a_set_and_return_the_same_bits(tmp_path, world_size):
    folder = str(colour_set(tmp_path / "set", ["red", "green", "blue", "blue", "red"], shards=2))
    rows, targets, text = emoji_part(0, 1, folder)
    for of_rank in run_ranks(emoji_part, world_size, folder):
        assert torch.equal(of_rank[0], rows) and of_rank[1] == targets and torch.equal(of_rank[2], text)


def read_by(rank: int, world_size: int, folder: str, log: str) -> None:
    dataset = load_benchmark_set(folder)
    read = type(next(dataset.records())).decode
    seen = []
    embed.Record.decode = lambda record: (seen.append(record.where), read(record))[1]  # type: ignore[method-assign]
    embed_images(Embedder(clip=load_clip(BUNDLED_TEACHER), batch_size=2), dataset)
    with open(f"{log}-{rank}", "w") as file:
        file.write("\n".join(seen))


def test_a_process_decodes_its_own_batches_only(tmp_path):
    folder = str(colour_set(tmp_path / "set", ["red", "green", "blue", "blue", "red"], shards=1))
    run_ranks(read_by, 2, folder, str(tmp_path / "log"))
    first, second = ((tmp_path / f"log-{rank}").read_text().split("\n") for rank in (0, 1))
    assert [where[-6:-1] for where in first] == ["s0000"[-5:], "s0001", "s0004"]
    assert [where[-6:-1] for where in second] == ["s0002", "s0003"]


def one_of_two(rank: int, world_size: int) -> list:
    if rank == 1:
        return []
    clip = load_clip(BUNDLED_TEACHER)
    dataset = load_benchmark_set("emoji")
    images = [next(iter(dataset))[0]]
    return top_names(Embedder(clip=clip, batch_size=512), images=images, dataset=dataset, k=2)


def test_one_process_of_several_can_call_top_names():
    (best,) = run_ranks(one_of_two, 2)[0]  # the other does not call it: a collective would wait forever
    assert len(best) == 2 and best[0][1] >= best[1][1]


@pytest.fixture
def counted(monkeypatch):
    """The calls that embedded images or texts, and did not read the cache."""
    calls = []
    for name in ("_embed_batches", "_embed_tokens"):
        real = vars(embed)[name]
        monkeypatch.setattr(embed, name, lambda *args, _real=real, _name=name: (calls.append(_name), _real(*args))[1])
    return calls


def test_what_was_embedded_is_not_embedded_again(tmp_path, colour_blind, colours, counted):
    embedder = Embedder(clip=colour_blind, cache=tmp_path / "cache")
    first = embed_images(embedder, colours, "cls"), embed_texts(embedder, ["red", "blue"])
    again = embed_images(embedder, colours, "cls"), embed_texts(embedder, ["red", "blue"])
    assert counted == ["_embed_batches", "_embed_tokens"]
    assert torch.equal(first[0].rows, again[0].rows) and first[0].targets == again[0].targets
    assert torch.equal(first[1], again[1])
    # Other targets of the same images: the embeddings are cached, the targets are read from the set.
    assert embed_images(embedder, colours, "txt").targets["txt"][0] == ["something red", "a red square"]
    assert counted == ["_embed_batches", "_embed_tokens"]


def test_the_cache_records_broken_images(tmp_path, colour_blind, counted):
    dataset = broken_set(tmp_path / "set", good=3)
    embedder = Embedder(clip=colour_blind, cache=tmp_path / "cache", max_broken=0.5)
    for _ in range(2):
        images = embed_images(embedder, dataset, "cls")
        assert (images.broken, images.targets["cls"], len(images.rows)) == (1, [0, 0, 0], 3)
    assert counted == ["_embed_batches"]


def test_another_model_preprocessing_precision_or_image_is_another_entry(tmp_path, tiny, counted):
    cache, order = tmp_path / "cache", ["red", "green", "blue"]
    dataset = load_benchmark_set(str(colour_set(tmp_path / "set", order)))
    embedder = Embedder(clip=tiny, cache=cache)
    embed_images(embedder, dataset)
    squashed = replace(tiny, preprocess=replace(tiny.preprocess, interpolation="bilinear"))
    others = [replace(embedder, clip=squashed), replace(embedder, amp=True)]
    for other in others:
        embed_images(other, dataset)
    embed_images(embedder, load_benchmark_set(str(colour_set(tmp_path / "other", ["red", "green", "red"]))))
    bias = tiny.towers.model.visual.ln_post.bias.data
    bias += 1
    try:
        embed_images(Embedder(clip=tiny, cache=cache), dataset)
    finally:
        bias -= 1
    assert len(counted) == 5
    # The same images in other shards are the same images.
    embed_images(embedder, load_benchmark_set(str(colour_set(tmp_path / "reshard", order, shards=3))))
    assert len(counted) == 5


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_cache_file_is_rebuilt(tmp_path, colour_blind, colours, counted, damage):
    embedder = Embedder(clip=colour_blind, cache=tmp_path / "cache")
    first = embed_images(embedder, colours)
    (path,) = (tmp_path / "cache").glob("images_*.safetensors")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 0x40  # a bit of a number: the file still loads
    path.write_bytes({"cut": whole[:-9], "flipped": bytes(flipped), "empty": b"", "foreign": b"{}"}[damage])
    assert torch.equal(embed_images(embedder, colours).rows, first.rows)
    assert counted == 2 * ["_embed_batches"]
    assert path.read_bytes() == whole
    assert disk_cache.read(path) is not None and len(list(path.parent.iterdir())) == 1


def cached_in_two(rank: int, world_size: int, folder: str, cache: str) -> torch.Tensor:
    # Only the folder of rank 0 has the embeddings, as on two machines: both have to embed.
    embedder = Embedder(clip=load_clip(BUNDLED_TEACHER), batch_size=2, cache=Path(f"{cache}-{rank}"))
    return embed_images(embedder, load_benchmark_set(folder)).rows


@pytest.mark.usefixtures("one_thread")
def test_processes_agree_on_whether_embeddings_are_cached(tmp_path):
    folder = str(colour_set(tmp_path / "set", ["red", "green", "blue", "blue", "red"]))
    expected = cached_in_two(0, 1, folder, str(tmp_path / "cache"))  # fills the folder of rank 0
    for rows in run_ranks(cached_in_two, 2, folder, str(tmp_path / "cache")):
        assert torch.equal(rows, expected)


def test_an_open_clip_model_object_is_a_clip(tiny, colours):
    clip = as_clip(tiny.towers.model, tiny.tokenize, name="own")
    assert (clip.name, clip.embed_dim, clip.preprocess) == ("own", tiny.embed_dim, tiny.preprocess)
    ours, theirs = (embed_images(Embedder(clip=c), colours).rows for c in (clip, tiny))
    assert torch.equal(ours, theirs)
