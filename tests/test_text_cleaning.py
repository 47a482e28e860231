"""An exported tokenizer gives the token ids of open_clip, which cleans texts in Python first, and a transformers
teacher is tokenized as open_clip tokenizes the same model."""

import json

import ftfy
import pytest
import test_clip_models as models
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, get_clean_fn
from test_hub import CARD
from tokenizers import normalizers

from gkl_vl.assets.build_tokenizer import build
from gkl_vl.export.hub import export_clip
from gkl_vl.export.text_cleaning import cleaning, save_tokenizer, with_cleaning
from gkl_vl.models.clip import load_clip
from gkl_vl.models.pretrained import BUNDLED_TOKENIZER, BUNDLED_TOKENIZER_NAME

BPE = SimpleTokenizer()
TEXTS = [
    "it’s a “cat” and a ‘dog’",
    "fish &amp; chips",
    "Tom &amp;amp;amp; Jerry, 3 &amp;lt; 4 &#38;gt; 2",
    "&quot;caf&eacute;&quot; P&EACUTE;REZ &AMP; sons",
    "&#39;x&#x27; &#8217; &#0034; &#150; &#x2014;",
    "&copy 2020 &notin; &notit; AT&T &Co; S&P 500",
    "I &lt;3 cats",
    "a&nbsp;b&#160;c &hellip; &euro;5",
    "ＬＯＵＤ　ＮＯＩＳＥＳ！ Ｕﾀｰﾝ ｶﾞ",
    "ﬂuﬃest ﬁsh ǆ ŉ ﬅ",
    "ΟΔΥΣΣΕΥΣ ΣΑΣ, Σ ΑΣ’Σ",
    "İstanbul Straße ẞ",
    "a\x1cb \x85 c\x07d \ufeff\u200be",
    "\x93hi\x94 \x80",
    "\x1b[36;44mblue\x1b[0m",
    "cafe\u0301 \u1e9b\u0323",
    "  two\n\nlines\t and   spaces  ",
    "👩‍👩‍👧 🇩🇪 ½ ² ①",
    "",
    "&",
    "a_b-c.d",
]
PIECES = st.one_of(
    st.sampled_from(["&amp;", "&lt;", "&quot", "&#39;", "&#x2019;", "amp;", "&", ";", "&eacute;", "&copy", "&frac12;"]),
    st.sampled_from(["“", "’", "ﬁ", "Ａ", "ｶ", "　", "Σ", "é", "e\u0301", "\xad", "\x07", "\u2028", "🙂", "’s", "'RE"]),
    st.text("abcXYZ 019.,!?'-_", max_size=4),
)


def no_mojibake(text: str) -> bool:
    """Whether ftfy does not repair an encoding; it also leaves entities alone in a text with a literal `<`."""
    return ftfy.fix_text(text) == ftfy.fix_text(text, fix_encoding=False) and "<" not in text


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """AutoTokenizers of an export with CLIP's BPE, and of one with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("exports")
    (folder / "m").mkdir()
    bpe = load_clip(f"local-dir:{models.tiny_folder(folder / 'm' / 'bpe')}")
    export_clip(clip=bpe, folder=folder / "bpe", card=CARD)
    export_clip(clip=load_clip("emoji-student"), folder=folder / "bundled", card=CARD)
    return {name: transformers.AutoTokenizer.from_pretrained(folder / name) for name in ("bpe", "bundled")} | {
        "folder": folder
    }


def ids(tokenizer, texts: list[str], length: int):
    padded = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return padded.input_ids


@pytest.mark.parametrize("text", TEXTS)
def test_an_exported_tokenizer_has_open_clips_ids(exported, text):
    ours = exported["bpe"](text).input_ids
    assert ours[1:-1] == BPE.encode(text)
    bundled = HFTokenizer(str(BUNDLED_TOKENIZER), context_length=24, trust_remote_code=False)
    assert ids(exported["bundled"], [text], 24).tolist() == bundled([text]).tolist()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(PIECES, max_size=8).map("".join))
@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_the_steps_are_open_clips_function(clean, text):
    assume(no_mojibake(text) and not text.isspace())
    steps = normalizers.Sequence(cleaning(clean))
    assert steps.normalize_str(text) == get_clean_fn(clean)(text)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.lists(PIECES, max_size=8).map("".join))
def test_ids_of_any_text_are_equal(exported, text):
    assume(no_mojibake(text))
    assert exported["bpe"](text).input_ids[1:-1] == BPE.encode(text)


def test_transformers_processor_and_open_clip_load_the_same_tokenizer(exported):
    processor = transformers.CLIPProcessor.from_pretrained(exported["folder"] / "bpe")
    expected = load_clip(f"local-dir:{exported['folder'] / 'bpe'}").tokenize(TEXTS)
    got = processor(text=TEXTS, padding="max_length", truncation=True, max_length=8, return_tensors="pt").input_ids
    lengths = (expected != 0).sum(dim=1)
    assert all(got[i, : lengths[i]].tolist() == expected[i, : lengths[i]].tolist() for i in range(len(TEXTS)))
    again = load_clip(f"local-dir:{exported['folder'] / 'bundled'}")
    assert again.tokenize(TEXTS).tolist() == load_clip("emoji-student").tokenize(TEXTS).tolist()


@pytest.mark.parametrize("name", ["bpe", "bundled"])
@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_every_cleaning_is_exported_or_the_format_left_out(tmp_path, name, clean):
    """CLIP's BPE with case has no equivalent in transformers."""
    text = models.TINY["text_cfg"] | {"tokenizer_kwargs": {"clean": clean}, "context_length": 12}
    if name == "bundled":
        text |= {"vocab_size": 4096, "hf_tokenizer_name": BUNDLED_TOKENIZER_NAME}
    (tmp_path / "x.json").write_text(json.dumps(models.TINY | {"text_cfg": text}))
    clip = load_clip(str(tmp_path / "x.json"))
    export_clip(clip=clip, folder=tmp_path / "e", card=CARD)
    assert (tmp_path / "e" / "model.safetensors").is_file() == ((name, clean) != ("bpe", "whitespace"))
    if (name, clean) == ("bpe", "whitespace"):
        return
    texts = [
        *TEXTS,
        "Hi ! THERE!!",
        "!",
        "a_b!c",
        "<|endoftext|> a",
        "a <|startoftext|>",
        "x <end_of_text> y",
        "x<|endoftext|>&",
    ]
    exported = ids(transformers.AutoTokenizer.from_pretrained(tmp_path / "e"), texts, 12)
    expected = clip.tokenize(texts)
    assert load_clip(f"local-dir:{tmp_path / 'e'}").tokenize(texts).tolist() == expected.tolist()
    for ours, theirs in zip(exported.tolist(), expected.tolist(), strict=True):
        length = theirs.index(max(theirs[1:])) + 1  # CLIP's BPE is padded with 0 by open_clip
        assert ours[:length] == theirs[:length]


def test_an_export_of_an_export_is_cleaned_once(exported, tmp_path):
    again = load_clip(f"local-dir:{exported['folder'] / 'bundled'}")
    export_clip(clip=again, folder=tmp_path / "again", card=CARD)
    first = (exported["folder"] / "bundled" / "tokenizer.json").read_text()
    assert (tmp_path / "again" / "tokenizer.json").read_text() == first


def test_siglips_cleaning_is_exported(tmp_path):
    save_tokenizer(with_cleaning(build(), "canonicalize"), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    reference = HFTokenizer(str(BUNDLED_TOKENIZER), context_length=24, clean="canonicalize", trust_remote_code=False)
    assert ids(tokenizer, TEXTS, 24).tolist() == reference(TEXTS).tolist()


# ---- teachers of transformers


@pytest.mark.parametrize("make, clean", [(models.clip_folder, "whitespace"), (models.siglip_folder, "canonicalize")])
def test_a_teacher_of_transformers_is_tokenized_as_open_clip_does(tmp_path, make, clean):
    folder = make(tmp_path / "m")
    reference = HFTokenizer(str(BUNDLED_TOKENIZER), context_length=12, clean=clean, trust_remote_code=False)
    assert load_clip(f"transformers:{folder}").tokenize(TEXTS).tolist() == reference(TEXTS).tolist()


def test_siglip_2_with_a_cased_tokenizer_gets_lower_case(tmp_path):
    """Gemma's tokenizer keeps case and punctuation; SigLIP 2 was trained without."""
    folder = models.siglip_folder(tmp_path / "m")
    cased = transformers.AutoTokenizer.from_pretrained(folder)
    cased.backend_tokenizer.normalizer = normalizers.NFC()
    save_tokenizer(cased, folder)
    tokenize = load_clip(f"transformers:{folder}").tokenize
    assert tokenize(["A Photo of a Cat."]).tolist() == tokenize(["a photo of a cat"]).tolist()


def test_the_bundled_tokenizer_has_its_name():
    assert load_clip("emoji-student").model_cfg["text_cfg"]["hf_tokenizer_name"] == BUNDLED_TOKENIZER_NAME
