"""Pushes through the unmodified huggingface_hub to a Hub on loopback: what was pushed comes back equal in open_clip,
transformers, sentence-transformers and this package; a push is one commit or none; a failure is one line with a remedy
and leaves folder and repository as they were; the token goes to the Hub alone."""

import dataclasses
import json
import traceback
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import hub_server
import numpy as np
import pytest
import torch
from hub_server import ME, OTHER, READER, loopback_hub, run_client, use_in_process
from PIL import Image
from safetensors.torch import save_file
from test_hub import CARD, CONFIGS, TEXTS, make_clip
from test_label_export import CARD as CLASSIFIER_CARD
from test_label_export import logits, pixels, trained
from test_pairs import good, write_shard

from gkl_vl import cli
from gkl_vl.errors import UserError
from gkl_vl.export import push
from gkl_vl.export.hub import export_classifier, export_clip
from gkl_vl.export.push import check_access, check_target, push_to_hub

# Pushes three folders from the command line, then loads them by their names on the Hub.
VISIT = """
import json, sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
from gkl_vl import cli
from gkl_vl.export import push

work = Path(sys.argv[1])
cli.run(push.main, push.Config, [str(work / "run"), "--to", "me/tiny"])
cli.run(push.main, push.Config, [str(work / "run" / "model"), "--to", "lab/tiny", "--private", "--revision", "trial/1"])
cli.run(push.main, push.Config, [str(work / "classifier"), "--to", "me/classes"])

from huggingface_hub import HfApi, constants, snapshot_download
constants.HF_HUB_DISABLE_XET, refused = False, ""  # the client's other protocol, which this Hub does not have
try:
    push.push_to_hub(folder=work / "classifier", repo_id="me/xet")
except ValueError as error:
    refused = str(error)
constants.HF_HUB_DISABLE_XET = True
texts, image = json.loads((work / "texts.json").read_text()), Image.open(work / "image.png")
listed = {file.path: file.size for file in HfApi().list_repo_tree("me/tiny", recursive=True)}
branches = [branch.name for branch in HfApi().list_repo_refs("lab/tiny").branches]

import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:me/tiny")
with torch.no_grad():
    out = {
        "open_clip_image": model.eval().encode_image(preprocess(image)[None], normalize=True),
        "open_clip_text": model.encode_text(open_clip.get_tokenizer("hf-hub:me/tiny")(texts), normalize=True),
    }

from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
model, tokenizer = AutoModel.from_pretrained("me/tiny").eval(), AutoTokenizer.from_pretrained("me/tiny")
processor = AutoImageProcessor.from_pretrained("me/tiny", backend="pil")
tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
with torch.no_grad():
    result = model(**tokens, **processor(image, return_tensors="pt"))
out |= {"transformers_image": result.image_embeds, "transformers_text": result.text_embeds}

from sentence_transformers import SentenceTransformer
model = SentenceTransformer("me/tiny", device="cpu")
out |= {"sentence_transformers_text": model.encode(texts, normalize_embeddings=True, convert_to_tensor=True)}

from gkl_vl.models.classifiers import load_classifier
from gkl_vl.models.clip import load_clip
folder = snapshot_download("lab/tiny", revision="trial/1")
open_clip.create_model_and_transforms(f"local-dir:{folder}")
assert open_clip.get_tokenizer(f"local-dir:{folder}")(texts).equal(open_clip.get_tokenizer("hf-hub:me/tiny")(texts))
for key, name in {"ours": "hf-hub:me/tiny", "ours_hf": "transformers:me/tiny", "branch": f"local-dir:{folder}"}.items():
    clip = load_clip(name)
    with torch.no_grad():
        out[f"{key}_image"] = clip.towers.eval().encode_image(clip.image_transform()(image)[None])
        out[f"{key}_text"] = clip.towers.encode_text(clip.tokenize(texts))
classifier = load_classifier("hf-hub:me/classes")
with torch.no_grad():
    out["logits"] = classifier.model.eval()(classifier.prepare(torch.load(work / "pixels.pt")))
np.savez(work / "out.npz", **{key: tensor.numpy() for key, tensor in out.items()})
(work / "told.json").write_text(json.dumps({"listed": listed, "branches": branches, "refused": refused}))
"""


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    """A student and a classifier that were pushed and loaded in a process of its own: hub, work folder, results."""
    work = tmp_path_factory.mktemp("visit")
    clip, classifier = make_clip(work, "small_bpe"), trained("resnet8")
    export_clip(clip=clip, folder=work / "run" / "model", card=CARD)
    export_classifier(classifier=classifier, folder=work / "classifier", card=CLASSIFIER_CARD)
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    image.save(work / "image.png")
    (work / "texts.json").write_text(json.dumps(TEXTS))
    torch.save(pixels(), work / "pixels.pt")
    with torch.no_grad():
        expected = {
            "image": clip.towers.encode_image(clip.image_transform()(image)[None]),
            "text": clip.towers.encode_text(clip.tokenize(TEXTS)),
            "logits": logits(classifier),
        }
    with loopback_hub() as hub:
        ran = run_client(hub, VISIT, work, home=work / "home")
    assert ran.returncode == 0, ran.stderr
    told, loaded = json.loads((work / "told.json").read_text()), dict(np.load(work / "out.npz"))
    return SimpleNamespace(hub=hub, work=work, ran=ran, loaded=loaded, expected=expected, **told)


@pytest.fixture
def hub(monkeypatch):
    """A new Hub, to which this process's client talks as the user `me`."""
    with loopback_hub() as hub:
        use_in_process(hub, monkeypatch)
        yield hub


@pytest.fixture
def folder(tmp_path):
    """What an export looks like, with weights of one number."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIGS["small_bpe"]}))
    save_file({"weight": torch.ones(1)}, folder / "open_clip_model.safetensors")
    (folder / "README.md").write_text(CARD.render())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- there and back


@pytest.mark.parametrize("by", ["open_clip", "transformers", "sentence_transformers", "ours", "ours_hf", "branch"])
def test_a_student_comes_back_equal(visit, by: str):
    for side in ("image", "text"):
        if f"{by}_{side}" in visit.loaded:
            np.testing.assert_allclose(visit.loaded[f"{by}_{side}"], visit.expected[side].numpy(), atol=1e-5)
    assert np.abs(visit.loaded[f"{by}_text"][0] - visit.loaded[f"{by}_text"][1]).max() > 1e-3


def test_a_classifier_comes_back_equal(visit):
    np.testing.assert_allclose(visit.loaded["logits"], visit.expected["logits"].numpy(), atol=1e-5)


def test_a_push_is_one_commit_of_exactly_the_folder(visit):
    hub, folder = visit.hub, contents(visit.work / "run" / "model")
    assert len(hub.repos["me/tiny"].commits) == 2  # the first is the repository's
    renamed = {"README.md", "open_clip_config.json"}
    for pushed in (hub.files("me/tiny"), hub.files("lab/tiny", "trial/1")):
        assert pushed.keys() == folder.keys()
        assert {path for path in folder if pushed[path] != folder[path]} == renamed
    assert hub.files("me/classes").keys() == contents(visit.work / "classifier").keys()
    sizes = {path: len(content) for path, content in hub.files("me/tiny").items()}
    assert {path: size for path, size in visit.listed.items() if path != ".gitattributes"} == sizes
    assert {len(content) for content in hub.large.values()} >= {sizes["open_clip_model.safetensors"]}  # not in git
    pushed = [f"Pushed: {hub.address}/{repo_id}" for repo_id in ("me/tiny", "lab/tiny", "me/classes")]
    assert visit.ran.stdout.splitlines() == pushed


def test_the_pushed_card_and_config_name_the_repository(visit):
    files = visit.hub.files("me/tiny")
    config = json.loads(files["open_clip_config.json"])["model_cfg"]["text_cfg"]
    assert config["hf_tokenizer_name"] == "me/tiny"  # by which open_clip loads the tokenizer
    card = files["README.md"].decode()
    assert 'create_model_and_transforms("hf-hub:me/tiny")' in card and 'from_pretrained("me/tiny")' in card
    assert "path/to/this/folder" not in card
    folder = visit.work / "run" / "model"  # stays that of a folder
    assert "path/to/this/folder" in (folder / "README.md").read_text()
    assert json.loads((folder / "open_clip_config.json").read_text())["model_cfg"] == CONFIGS["small_bpe"]
    classes = visit.hub.files("me/classes")["README.md"].decode()
    assert 'load_classifier("hf-hub:me/classes")' in classes and "path/to" not in classes


def test_a_branch_is_made_and_main_is_left_alone(visit):
    assert visit.branches == ["main", "trial/1"] and visit.hub.files("lab/tiny") == {}
    assert visit.hub.repos["lab/tiny"].private and not visit.hub.repos["me/tiny"].private
    card = visit.hub.files("lab/tiny", "trial/1")["README.md"].decode()
    assert "hf download lab/tiny --revision trial/1 --local-dir tiny" in card and '"local-dir:tiny"' in card


def test_the_token_goes_to_the_hub_alone(visit):
    printed = visit.ran.stdout + visit.ran.stderr
    written = [printed.encode(), *contents(visit.work).values(), *visit.hub.files("me/tiny").values()]
    assert len(written) > 20 and not any(ME.encode() in content for content in written)
    to_storage = [token for method, path, token in visit.hub.requests if path.startswith(("/upload", "/download"))]
    assert len(to_storage) > 3 and set(to_storage) == {None}  # another host than the Hub's
    assert ("POST", "/api/models/me/tiny/commit/main", ME) in visit.hub.requests


def test_a_failure_of_xet_is_one_line_and_no_commit(visit):
    if find_spec("hf_xet") is None:
        pytest.skip("the client has no Xet without it")
    assert "/api/models/me/xet/xet-write-token/main" in [path for _, path, _ in visit.hub.requests]
    assert visit.refused.startswith("pushing to 'me/xet' failed (") and "\n" not in visit.refused
    assert visit.refused.endswith("--to me/xet") and visit.hub.files("me/xet") == {}


# ---- pushing again


def test_a_second_push_replaces_the_first_one_whole(hub, folder):
    push_to_hub(folder=folder, repo_id="me/tiny")
    (folder / "onnx").mkdir()
    more = ["config.json", "model.safetensors", "onnx/onnx_config.json", "onnx/image.onnx"]
    for name in [*more, ".secret"]:
        (folder / name).write_text("{}")
    push_to_hub(folder=folder, repo_id="me/tiny")
    repo, theirs = hub.repos["me/tiny"], {"LICENSE": hub_server.Blob(b"theirs", large=False)}
    repo.commit("main", repo.commits[repo.branches["main"]] | theirs)
    assert hub.files("me/tiny").keys() == {*contents(folder), "LICENSE"} - {".secret"}
    for name in more:  # with these left behind, AutoModel and onnxruntime would load the student of before
        (folder / name).unlink()
    push_to_hub(folder=folder, repo_id="me/tiny")
    assert hub.files("me/tiny").keys() == {*contents(folder), "LICENSE"} - {".secret"}
    repo.commit("main", repo.commits[repo.branches["main"]] | {"onnx/model.onnx": hub_server.Blob(b"x", large=True)})
    push_to_hub(folder=folder, repo_id="me/tiny")
    assert "onnx/model.onnx" in hub.files("me/tiny")  # not of this package
    commits = len(repo.commits)
    push_to_hub(folder=folder, repo_id="me/tiny")
    assert len(repo.commits) == commits  # nothing has changed


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(hub, folder, monkeypatch):
    push_to_hub(folder=folder, repo_id="me/tiny")
    before = hub.files("me/tiny")
    (folder / "config.json").write_text("{}")
    upload, repo = hub_server.Handler.preupload, hub.repos["me/tiny"]

    def commit_first(handler, hub, repo_id, revision):
        repo.commit("main", repo.commits[repo.branches["main"]] | {"LICENSE": hub_server.Blob(b"theirs", large=False)})
        upload(handler, hub, repo_id, revision)

    routes = [(pattern, commit_first if route is upload else route) for pattern, route in hub_server.ROUTES]
    monkeypatch.setattr(hub_server, "ROUTES", routes)
    with pytest.raises(UserError, match="412 .*somebody else has committed in the meantime"):
        push_to_hub(folder=folder, repo_id="me/tiny")
    assert hub.files("me/tiny") == before | {"LICENSE": b"theirs"}


@pytest.mark.parametrize("how", ["drop", 500])
@pytest.mark.parametrize("where", ["PUT /upload", "POST .*/preupload/", "POST .*/batch", "POST .*/commit/"])
@pytest.mark.parametrize("revision", [None, "trial"])
def test_a_broken_upload_leaves_no_half_revision_and_can_be_repeated(hub, folder, where, how, revision):
    push_to_hub(folder=folder, repo_id="me/tiny", revision=revision)
    branch = "main" if revision is None else revision
    before = hub.files("me/tiny", branch)
    save_file({"weight": torch.zeros(1)}, folder / "open_clip_model.safetensors")
    (folder / "config.json").write_text("{}")
    kept = contents(folder)
    hub.fail(where, how)
    with pytest.raises(UserError, match=r"^pushing to 'me/tiny' failed \(.+\): check the connection") as caught:
        push_to_hub(folder=folder, repo_id="me/tiny", revision=revision)
    again = f"python -m gkl_vl.export.push {folder} --to me/tiny" + ("" if revision is None else " --revision trial")
    assert str(caught.value).endswith(f", then run {again}") and "\n" not in str(caught.value)
    assert hub.files("me/tiny", branch) == before and contents(folder) == kept
    hub.failures.clear()
    push_to_hub(folder=folder, repo_id="me/tiny", revision=revision)
    assert hub.files("me/tiny", branch).keys() == kept.keys()
    assert hub.files("me/tiny", branch)["open_clip_model.safetensors"] == kept["open_clip_model.safetensors"]


def test_the_second_of_two_large_files_that_breaks_leaves_nothing_of_the_first(hub, folder):
    (folder / "model.safetensors").write_text("of transformers")
    hub.fail("PUT /upload", 500, after=1)
    with pytest.raises(UserError, match="Error while uploading '.*model.safetensors'"):
        push_to_hub(folder=folder, repo_id="me/tiny")
    assert len(hub.large) == 1 and hub.files("me/tiny") == {}


# ---- refusals


@pytest.mark.parametrize(
    "token, repo_id, message",
    [
        (OTHER, "me/tiny", "403 You have read access but .*: the token may not write to me/tiny, use one with write"),
        (OTHER, "me/new", "403 .*: the token may not write to me/new"),
        (OTHER, "me/hidden", "403 .*: the token may not write to me/hidden"),
        (READER, "me/tiny", "403 .*: the token may not write to me/tiny"),
        ("hf_" + "x" * 34, "me/tiny", "401 .*: the token is not valid, create a new one and set HF_TOKEN"),
    ],
)
def test_a_refused_push_is_one_line_with_a_remedy(hub, folder, monkeypatch, capsys, token, repo_id, message):
    push_to_hub(folder=folder, repo_id="me/tiny")
    push_to_hub(folder=folder, repo_id="me/hidden", private=True)
    before, kept = (hub.files("me/tiny"), hub.files("me/hidden")), contents(folder)
    monkeypatch.setenv("HF_TOKEN", token)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(push.main, push.Config, [str(folder), "--to", repo_id])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and line.startswith("error: pushing to ")
    with pytest.raises(UserError, match=message):
        push_to_hub(folder=folder, repo_id=repo_id)
    assert (hub.files("me/tiny"), hub.files("me/hidden")) == before and "me/new" not in hub.repos
    assert contents(folder) == kept


def test_a_public_repository_does_not_stay_public_by_accident(hub, folder):
    push_to_hub(folder=folder, repo_id="me/tiny")
    with pytest.raises(UserError, match="'me/tiny' exists and is public: make it private in its settings, or push"):
        push_to_hub(folder=folder, repo_id="me/tiny", private=True)
    push_to_hub(folder=folder, repo_id="me/hidden", private=True)
    push_to_hub(folder=folder, repo_id="me/hidden")
    assert hub.repos["me/hidden"].private


def test_without_network_a_push_is_one_line(hub, folder, monkeypatch):
    monkeypatch.setattr(push.constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: connection refused
    with pytest.raises(UserError, match=r"^pushing to 'me/tiny' failed .*: check the connection and HF_ENDPOINT, then"):
        push_to_hub(folder=folder, repo_id="me/tiny")


def test_a_token_that_the_hub_repeats_is_not_shown(hub, folder):
    hub.fail("POST .*/create", "echo")
    with pytest.raises(UserError, match=r"authorization.*Bearer \*\*\*") as caught:
        push_to_hub(folder=folder, repo_id="me/tiny")
    assert ME not in "".join(traceback.format_exception(caught.value))
    hub.failures.clear()
    hub.fail("POST .*/create", 500)
    with pytest.raises(UserError) as caught:
        push_to_hub(folder=folder, repo_id="me/tiny")
    assert caught.value.__cause__ is not None  # for --debug


def test_a_folder_without_a_model_is_not_pushed(hub, tmp_path):
    (tmp_path / "notes.txt").write_text("private")
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="holds no open_clip_config.json, no CLIP of transformers, no classifier"):
            push_to_hub(folder=place, repo_id="me/tiny")
    assert hub.repos == {} and hub.requests == []


@pytest.mark.parametrize("repo_id", ["tiny", "a/b/c", "me/ti ny", "me/tiny--2", "", "/tiny", "me/"])
def test_a_malformed_repository_name_is_refused(hub, repo_id: str):
    with pytest.raises(UserError, match="repository name"):
        check_target(repo_id)


@pytest.mark.parametrize("revision", ["", "a b", "a..b", "/a", "a/", "-a", "a\nb", "a//b", "0" * 40])
def test_a_malformed_branch_is_refused(hub, revision: str):
    with pytest.raises(UserError, match="--revision .* is (no name of a branch|a commit)"):
        check_target("me/tiny", revision)
    check_target("me/tiny", "v1.0/trial-2")


def test_no_token_and_offline_mode_are_refused(hub, monkeypatch):
    monkeypatch.setattr(push.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        check_target("me/tiny")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(push, "get_token", lambda: None)  # this machine may have one
    with pytest.raises(UserError, match="no Hub token .*hf auth login"):
        check_target("me/tiny")


# ---- before and after a run


@pytest.mark.parametrize(
    "token, repo_id, message",
    [
        (READER, "me/tiny", "the Hub token of 'me' can only read: create one with write access"),
        (ME, "other/tiny", "of 'me' may not write to 'other/tiny': use one of me, lab as its owner"),
        ("hf_wrong", "me/tiny", "does not tell whether 'me/tiny' can be pushed .*the token is not valid"),
    ],
)
def test_what_a_token_may_not_do_is_known_before_the_run(hub, token, repo_id, message):
    with pytest.raises(UserError, match=message) as caught:
        check_access(repo_id, token=token)
    assert "\n" not in str(caught.value) and token not in str(caught.value)
    check_access("lab/tiny", token=ME)
    check_access("Me/tiny", token=ME)


@pytest.fixture
def recipe(tmp_path, run_script, monkeypatch):
    """recipe(*flags) -> (exit code, stdout, stderr) of a run of one step on six pairs."""
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "pairs.tar", [good(i) for i in range(6)])
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIGS["small_bpe"]))
    flags = ["--teacher", "none", "--student", "tiny.json", "--train-data", "pairs.tar", "--steps", "1"]
    flags += ["--batch-size", "4", "--workers", "0", "--eval-data", "--output-dir", "run"]
    script = Path(__file__).parents[1] / "recipes" / "clip_kd.py"
    return lambda *more: run_script(script, *flags, *more)


def test_a_recipe_pushes_its_student(hub, recipe, tmp_path):
    code, out, error = recipe("--push-to-hub", "lab/tiny", "--private", "--revision", "trial")
    assert code == 0 and f"Pushed: {hub.address}/lab/tiny" in out, error
    assert hub.files("lab/tiny", "trial").keys() == contents(tmp_path / "run" / "model").keys()
    assert hub.repos["lab/tiny"].private and hub.files("lab/tiny") == {}
    card = hub.files("lab/tiny", "trial")["README.md"].decode()
    assert "report.png" in hub.files("lab/tiny", "trial") and "](report.png)" in card
    for fact in ("Images seen: 4\n", "Hardware: 1 x cpu", "Versions: `Python 3.", "Hours: less than 0.01"):
        assert fact in card, fact
    assert not any(ME.encode() in content for content in [*contents(tmp_path).values(), (out + error).encode()])


def test_a_recipe_that_may_not_push_ends_before_it_starts(hub, recipe, tmp_path):
    code, _, error = recipe("--push-to-hub", "other/tiny")
    assert (code, error.count("\n")) == (2, 1) and "may not write to 'other/tiny'" in error
    assert not (tmp_path / "run").exists()


def test_a_recipe_whose_push_fails_keeps_its_student(hub, recipe, tmp_path):
    hub.fail("POST .*/commit/", 500)
    code, out, error = recipe("--push-to-hub", "me/tiny")
    assert code == 2 and error.splitlines()[-1].startswith("error: pushing to 'me/tiny' failed")
    assert "then run python -m gkl_vl.export.push run/model --to me/tiny" in error
    hub.failures.clear()
    cli.run(push.main, push.Config, ["run", "--to", "me/tiny"])
    assert hub.files("me/tiny").keys() == contents(tmp_path / "run" / "model").keys()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--private"], "--private has no effect without --push-to-hub"),
        (["--revision", "x"], "--revision x has no effect without --push-to-hub"),
        (["--push-to-hub", "me/tiny", "--revision", "a b"], "--revision 'a b' is no name of a branch"),
    ],
)
def test_flags_of_the_push_that_do_not_fit_are_refused(hub, recipe, flags, message):
    code, _, error = recipe(*flags)
    assert code == 2 and message in error


def test_a_pushed_command_has_no_secrets(hub, folder):
    command = "accelerate launch x.py --train-data 'https://u:pass@h.org/0.tar?X-Amz-Signature=signed' hf_" + "z" * 34
    card = dataclasses.replace(CARD, run=dataclasses.replace(CARD.run, command=command), datasets=[command]).render()
    assert "***@h.org/0.tar?X-Amz-Signature=***" in card
    assert not any(secret in card for secret in ("u:pass", "signed", "zzz"))
