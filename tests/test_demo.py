"""The page answers as the models do: classification and search by the same numbers, each image embedded once, nothing
served from outside of the folder, and every mistake of a user answered in words."""

import asyncio
import io
import json
import os
import shutil
import sys
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import colour_blind_clip, tiny_clip
from small_sets import write_picture

from gkl_vl.demo import search as search_module
from gkl_vl.demo.__main__ import gradio_environment
from gkl_vl.demo.classify import classify, parse_labels
from gkl_vl.demo.folder import as_jpeg, decode_named, open_folder
from gkl_vl.demo.models import DemoModel, load_model
from gkl_vl.demo.search import build, empty_index, search_image, search_words, thumbnail
from gkl_vl.errors import UserError
from gkl_vl.evaluation.embed import Embedder
from gkl_vl.models.clip import PACKAGE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed: gkl-vl[demo]")


def demo_model(clip, role="student") -> DemoModel:
    clip.towers.requires_grad_(False).eval()
    embedder = Embedder(clip=clip, alone=True)
    return DemoModel(
        role=role, title="tiny", embedder=embedder, parameters=9, image_parameters=5, ms_per_image=1.0, ms_per_text=1.0
    )


@pytest.fixture(scope="module")
def colours():
    return demo_model(colour_blind_clip())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return demo_model(tiny_clip(tmp_path_factory.mktemp("tiny")), role="teacher")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path):
    """Two colours, one of them twice, and a file that is no image."""
    root = tmp_path / "pictures"
    for name, colour in (("a/red.png", "red"), ("b.png", "green"), ("copy.png", "green")):
        write_picture(root / name, colour)
    (root / "broken.jpg").write_bytes(b"no image")
    return root


def built(root, *models):
    index = empty_index(open_folder(str(root)), models)
    build(index, Event())
    return index


# ---- classify ----------------------------------------------------------------------------------------------------


def test_labels_are_split_at_commas_and_lines_and_repeated_ones_named():
    labels = parse_labels(" cat, ice  cream\n\n,dog\nCat , ice_cream")
    assert labels.names == ("cat", "ice cream", "dog")
    assert labels.repeated == ("cat", "ice cream")


@pytest.mark.parametrize(
    ("text", "problem"),
    [(" ,\n", "Type the labels"), ("cat, CAT", "only label is 'cat'"), (",".join(map(str, range(1001))), "1,001")],
)
def test_too_few_or_too_many_labels_are_refused(text, problem):
    with pytest.raises(UserError, match=problem):
        parse_labels(text)


def test_probabilities_are_the_softmax_of_the_scaled_similarities(tiny):
    clip, image, labels = tiny.embedder.clip, Image.effect_noise((40, 30), 80).convert("RGB"), ["cat", "dog", "bird"]
    prediction = classify(tiny, image=image, labels=labels, template="a {c}.")
    with torch.no_grad():
        row = F.normalize(clip.towers.model.encode_image(clip.image_transform()(image)[None])[0], dim=0)
        logits = {}
        for label in labels:
            text = F.normalize(clip.towers.model.encode_text(clip.tokenize([f"a {label}."]))[0], dim=0)
            logits[label] = float(clip.towers.model.logit_scale.exp() * (row @ text))
    total = sum(torch.tensor(logit).exp() for logit in logits.values())
    assert [label for label, _ in prediction.probabilities] == sorted(labels, key=lambda label: -logits[label])
    for label, probability in prediction.probabilities:
        assert probability == pytest.approx(float(torch.tensor(logits[label]).exp() / total), rel=1e-4)
    assert prediction.image_ms > 0 and prediction.ms_per_text > 0


def test_a_prompt_without_a_place_for_the_label_is_refused(tiny):
    with pytest.raises(UserError, match="no place for the label"):
        classify(tiny, image=Image.new("RGB", (8, 8)), labels=["a", "b"], template="a photo")


# ---- the folder --------------------------------------------------------------------------------------------------


def test_links_out_of_the_folder_are_left_out(pictures, tmp_path, capsys):
    write_picture(tmp_path / "outside" / "secret.png", "blue")
    (pictures / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    (pictures / "folder").symlink_to(tmp_path / "outside")
    (pictures / "within.png").symlink_to(pictures / "b.png")
    assert open_folder(str(pictures)).names == ("a/red.png", "b.png", "broken.jpg", "copy.png", "within.png")
    assert "2 images are links out of this folder" in capsys.readouterr().err


def test_a_file_that_becomes_a_link_out_of_the_folder_is_not_read(pictures, colours, cache):
    index = empty_index(open_folder(str(pictures)), [colours])
    (pictures / "b.png").unlink()
    (pictures / "b.png").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="link out of the folder"):
        thumbnail(index, 1)


def test_jpegs_keep_no_metadata_of_the_image():
    file = io.BytesIO()
    Image.new("RGB", (50, 20)).save(file, "JPEG", comment=b"private", exif=b"Exif\0\0private")
    drawn = as_jpeg(decode_named(file.getvalue(), "x"), 25)
    assert b"private" not in drawn
    assert Image.open(io.BytesIO(drawn)).size == (25, 10)


# ---- search ------------------------------------------------------------------------------------------------------


def test_images_are_ranked_by_words_and_by_an_image(pictures, colours, cache):
    index = built(pictures, colours)
    names = index.folder.names
    (by_words,) = search_words(index, "something green")
    assert [names[number] for number in by_words.order] == ["b.png", "copy.png", "a/red.png"]
    assert by_words.similarities == sorted(by_words.similarities, reverse=True)
    (by_image,) = search_image(index, decode_named((pictures / "a" / "red.png").read_bytes(), "red"))
    assert names[by_image.order[0]] == "a/red.png"
    assert by_image.similarities[0] == pytest.approx(1)
    assert index.seen == 4 and len(index.broken) == 1 and "broken.jpg cannot be decoded" in index.broken[0]


def counted(monkeypatch):
    """Numbers of images that were embedded, call by call."""
    counts, embed = [], search_module.embed_images

    def count(model, images):
        counts.append((model.role, len(images)))
        return embed(model, images)

    monkeypatch.setattr(search_module, "embed_images", count)
    return counts


def test_each_distinct_image_is_embedded_once_by_each_model(pictures, colours, tiny, cache, monkeypatch):
    counts = counted(monkeypatch)
    first = built(pictures, colours)
    assert counts == [("student", 2)]  # b.png and copy.png are equal
    again = built(pictures, colours, tiny)
    assert counts == [("student", 2), ("teacher", 2)]
    assert torch.equal(first.rows[0], again.rows[0])
    write_picture(pictures / "new.png", "blue")
    (pictures / "b.png").rename(pictures / "z.png")
    assert built(pictures, colours, tiny).problem == ""
    assert counts[2:] == [("student", 1), ("teacher", 1)]


class StopAfterOne(Event):
    """Set from the second call on."""

    calls = 0

    def is_set(self):
        self.calls += 1
        return self.calls > 1


def test_a_stopped_index_keeps_what_was_cached(pictures, colours, cache, monkeypatch):
    monkeypatch.setattr(search_module, "_BATCH", 1)
    counts = counted(monkeypatch)
    built(pictures, colours)
    stopped = empty_index(open_folder(str(pictures)), [colours])
    build(stopped, StopAfterOne())
    assert stopped.seen == 1 and not stopped.has_ended
    built(pictures, colours)
    assert counts == [("student", 1)] * 2


def test_an_index_that_cannot_be_built_says_why(pictures, colours, cache, monkeypatch, capsys):
    def fail(model, images):
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(search_module, "embed_images", fail)
    index = built(pictures, colours)
    assert index.has_ended and index.problem == "out of memory"
    assert "out of memory" in capsys.readouterr().err
    with pytest.raises(UserError, match="out of memory"):
        search_words(index, "red")


def test_searches_without_a_query_or_without_images_are_refused(pictures, colours, cache):
    index = empty_index(open_folder(str(pictures)), [colours])
    with pytest.raises(UserError, match="Type what to look for"):
        search_words(index, "  ")
    with pytest.raises(UserError, match="No image is embedded yet"):
        search_words(index, "red")


def test_a_thumbnail_is_a_small_jpeg_before_and_after_its_image_is_embedded(tmp_path, colours, cache):
    write_picture(tmp_path / "p" / "a.png", "red", size=600)
    index = empty_index(open_folder(str(tmp_path / "p")), [colours])
    before = thumbnail(index, 0)
    build(index, Event())
    assert before == thumbnail(index, 0)
    assert Image.open(io.BytesIO(before)).size == (256, 256)


def test_an_exported_folder_is_the_model_that_it_holds():
    folder = PACKAGE / "assets" / "teacher"
    models = [load_model(name, role="student", device=torch.device("cpu")) for name in ("bundled", str(folder))]
    assert models[0].embedder.fingerprint == models[1].embedder.fingerprint
    assert models[1].title == "teacher" and models[1].ms_per_image > 0 and models[1].ms_per_text > 0
    assert 0 < models[1].image_parameters < models[1].parameters


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def run_demo(run_script, monkeypatch):
    for name in gradio_environment(""):
        monkeypatch.setenv(name, "")  # the command sets it, here in this process
    return lambda *flags: run_script(PACKAGE / "demo" / "__main__.py", *flags)


def test_without_gradio_the_line_names_the_extra(run_demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = run_demo("--model", "bundled")
    assert (code, err) == (2, "error: the page needs gradio: pip install 'gkl-vl[demo]'\n")


@needs_gradio
@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--model", "bundled", "--images", "missing"], "'missing' does not exist"),
        (["--model", "bundled", "--images", "file"], "'file' is a file"),
        (["--model", "bundled", "--images", "empty"], "holds no images but 1 .txt"),
        (["--model", "missing", "--port", "0"], "'missing' is no folder"),
        (["--model", "empty", "--port", "0"], "'empty' is a folder but not a finished run"),
        (["--model", "bundled", "--teacher", "ViT-B-32", "--port", "0"], "'ViT-B-32' is no folder"),
        (["--model", "bundled", "--port", "65536"], "--port 65536"),
        (["--model", "bundled", "--host", "192.0.2.1", "--port", "0"], "192.0.2.1:0 cannot be listened on"),
    ],
)
def test_a_mistake_at_the_start_is_one_line(run_demo, tmp_path, monkeypatch, flags, problem):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name in ("file", "empty/a.txt"):
        Path(name).write_text("text")
    code, _, err = run_demo(*flags)
    assert code == 2 and problem in err and err.count("\n") == 1


# ---- the page ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory, colours, tiny):
    """A running page with a student and a teacher: its port and its folder."""
    pytest.importorskip("gradio", reason="gradio is not installed: gkl-vl[demo]")
    from gkl_vl.demo.server import build_app, listen, server_of

    root = tmp_path_factory.mktemp("pictures")
    for number in range(150):
        write_picture(root / f"{number:03d}.png", ("red", "green", "blue")[number % 3], size=8 + number // 3)
    write_picture(root.parent / "secret.png", "red")
    (root / "link.png").symlink_to(root.parent / "secret.png")
    write_picture(Path(os.fsdecode(bytes(root) + b"/\xff.png")), "red")  # a name that is not UTF-8
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        for name, value in gradio_environment(str(tmp_path_factory.mktemp("uploads"))).items():
            patch.setenv(name, value)
        index = built(root, colours, tiny)
        with listen("127.0.0.1", 0) as listening:
            server = server_of(asyncio.run(within_a_loop(build_app, [colours, tiny], index, host="127.0.0.1")))
            thread = Thread(target=server.run, args=[[listening]])
            thread.start()
            yield listening.getsockname()[1], root
            server.should_exit = True
            thread.join()


async def within_a_loop(function, *args, **kwargs):
    """Calls the function where an event loop runs: gradio makes loops elsewhere, and does not close them."""
    return function(*args, **kwargs)


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, bytes, dict[str, str]]:
    """Status, content and headers; the path is sent as it is."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={"Host": host})
    response = connection.getresponse()
    content = response.status, response.read(), dict(response.getheaders())
    connection.close()
    return content


def test_images_are_served_by_number_and_nothing_by_path(page):
    port, root = page
    status, content, headers = get(port, "/image/4")
    assert "default-src 'self';" in headers["content-security-policy"]
    assert status == 200 and Image.open(io.BytesIO(content)).size == (9, 9)
    assert json.loads(get(port, "/names")[1])[4] == "004.png"
    assert len(json.loads(get(port, "/names")[1])) == 151  # without link.png
    for path in ("/image/151", "/image/-1", "/thumbnail/link.png", "/image/..%2F..%2Fetc%2Fpasswd", "/../etc/passwd"):
        status, content, _ = get(port, path)
        assert status in (404, 422) and b"root:" not in content, path
    for file in ("/etc/passwd", f"{root}/004.png", f"{root}/link.png", f"{root}/../secret.png", "pyproject.toml"):
        status, content, _ = get(port, f"/gradio_api/file={file}")
        assert status == 403 and len(content) < 200, file


def test_a_request_under_another_host_name_is_refused(page):
    assert get(page[0], "/names", host="attacker.example")[0] == 400
    assert get(page[0], "/names", host="localhost")[0] == 200


@pytest.fixture
def browser_page(page):
    """A tab of headless Chromium that shows the page, and the addresses that it requested."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        requests: list[str] = []
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(f"http://127.0.0.1:{page[0]}")
        yield tab, requests
        browser.close()


FIRST_TILE = "rest => Number.parseInt(document.querySelector('.tile')?.title) % 3 == rest"
"""The colour of the most similar image: its number modulo 3."""


def test_in_a_browser(page, browser_page, tmp_path):
    (tab, requests), (_, root) = browser_page, page
    (tmp_path / "broken.png").write_bytes(b"no image")
    file = tab.locator("input[type=file]")
    # an image alone is no mistake, a click without labels is
    file.first.set_input_files(root / "003.png")
    tab.get_by_label("Remove Image").first.wait_for()
    tab.get_by_role("button", name="Classify").click()
    tab.get_by_text("Type the labels to choose from").wait_for()
    # classify: labels in the order of their probability, shown as text and not run as HTML
    tab.get_by_label("Labels").fill("red, <img src=x onerror=document.title='run'>, Red")
    tab.get_by_role("button", name="Classify").click()
    tab.locator(".answer").nth(1).wait_for()
    assert tab.locator(".answer.student .label").all_inner_texts() == [
        "red",
        "<img src=x onerror=document.title='run'>",
    ]
    assert "counted once: red" in tab.locator(".message").inner_text()
    # a broken image: a message, the answer and the image are taken away
    tab.get_by_label("Remove Image").first.click()
    file.first.set_input_files(tmp_path / "broken.png")
    tab.get_by_text("broken.png cannot be decoded as an image.").wait_for()
    assert tab.locator(".answer").count() == 0
    tab.get_by_role("button", name="Classify").click()
    tab.get_by_text("Drop an image first.").wait_for()
    # search by nothing, by words, by an image
    tab.get_by_role("tab", name="Search").click()
    tab.get_by_role("button", name="Search").click()
    tab.get_by_text("Type what to look for").wait_for()
    tab.get_by_label("Words").fill("something green")
    tab.get_by_role("button", name="Search").click()
    tab.get_by_text("151 images by similarity to “something green”").wait_for()
    tab.wait_for_function(FIRST_TILE, arg=1)
    tab.wait_for_function("document.querySelector('.tile img').naturalWidth > 0")
    grid = tab.locator(".grid").first
    for shown in (60, 120, 151):  # further tiles come as the list is scrolled
        tab.wait_for_function("count => document.querySelector('.grid').children.length == count + 1", arg=shown)
        grid.evaluate("grid => grid.scrollTo(0, grid.scrollHeight)")
    file.nth(1).set_input_files(root / "000.png")
    tab.get_by_text("151 images by similarity to the image").wait_for()
    tab.wait_for_function(FIRST_TILE, arg=0)
    # nothing from another host, and no scrolling sideways on a phone
    assert tab.title() == "tiny - gkl_vl"
    assert {url for url in requests if not url.startswith((f"http://127.0.0.1:{page[0]}/", "blob:", "data:"))} == set()
    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
