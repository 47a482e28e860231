"""Rebuilds the bundled emoji data set from freely licensed drawings, byte for byte.

    python -m gkl_vl.assets.build_emoji --out gkl_vl/assets
    python -m gkl_vl.assets.build_emoji --check

A concept is one emoji, a style one set of drawings. Noto and Twemoji are training styles and Fluent is the unseen test
style; a tenth of the concepts is held out in all styles.

Only this script needs `npm` and `pip install pillow==13.0.0 resvg-py==0.5.0`; other versions may encode the same
images differently. Exit codes: 0; 1 if --check finds a difference; 2 on an error.
"""

import argparse
import collections
import filecmp
import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import PIL.features
from PIL import Image

PINNED = {"pillow": "13.0.0", "resvg-py": "0.5.0"}

# name -> version, and sha256 of the file that `npm pack` downloads
PACKAGES = {
    "emoji-datasource-google": ("16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "emoji-datasource-twitter": ("16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
    "fluentui-emoji": ("1.3.0", "ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5"),
    "cldr-annotations-full": ("48.2.0", "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1"),
    "cldr-annotations-derived-full": ("48.2.0", "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e"),
}

SIDE = 64
QUALITY = 80
KEYWORDS = 6
TEMPLATES = ("{c}", "an emoji of {c}")

# A skin tone alone is a colour patch. National flags are kept although Fluent has none: they are training images, and
# negative classes in the test.
LEFT_OUT = {"skin-tone"}

# CLDR name -> Fluent's file name, where they differ. "pouting face" is CLDR's former name of "enraged face".
FLUENT_NAMES = {
    "black bird": "blackbird",
    "deaf man": "man-deaf",
    "deaf person": "person-deaf",
    "deaf woman": "woman-deaf",
    "elf": "person-elf",
    "enraged face": "pouting-face",
    "face with crossed-out eyes": "knocked-out-face",
    "fairy": "person-fairy",
    "genie": "person-genie",
    "keycap #": "keycap-hashtag",
    "mage": "person-mage",
    "man with blond hair": "man-blonde-hair",
    "men with bunny ears": "man-with-bunny-ears",
    "men wrestling": "man-wrestling",
    "mermaid": "woman-merpeople",
    "merman": "man-merpeople",
    "merperson": "person-merpeople",
    "people with bunny ears": "person-with-bunny-ears",
    "people wrestling": "person-wrestling",
    "person with blond hair": "person-blonde-hair",
    "phoenix": "phoenix-bird",
    "red triangle pointed up": "red-triangle",
    "smiling face with open hands": "hugging-face",
    "stuffed flatbread": "stuffedbread-flat",
    "superhero": "person-superhero",
    "supervillain": "person-supervillain",
    "vampire": "person-vampire",
    "woman with blond hair": "woman-blonde-hair",
    "women with bunny ears": "woman-with-bunny-ears",
    "women wrestling": "woman-wrestling",
    "zombie": "person-zombie",
}


# ---- sources


def fetch(name, cache):
    """Opens the package's tar, downloaded with npm unless it is in the cache."""
    version, digest = PACKAGES[name]
    path = cache / f"{name}-{version}.tgz"
    if not path.exists():
        if shutil.which("npm") is None:
            die(f"npm not found: it is needed to download {name}@{version}")
        command = ["npm", "pack", "--silent", f"{name}@{version}"]
        done = subprocess.run(command, cwd=cache, capture_output=True, text=True)
        if done.returncode:
            die(f"`{' '.join(command)}` failed: {done.stderr.strip()[-200:]}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        die(f"{path} is not the file this script was written for (sha256 differs)")
    return tarfile.open(path)


def die(message) -> NoReturn:
    print(f"build_emoji: {message}", file=sys.stderr)
    sys.exit(2)


def members(archive, pattern):
    """File name without folder -> bytes, for files of the archive whose full path matches the regex."""
    files = {}
    for member in archive:  # in file order, so that the gzip stream is read once
        if re.fullmatch(pattern, member.name):
            files[member.name.rsplit("/", 1)[1]] = archive.extractfile(member).read()
    return files


def load_sources(cache):
    with fetch("emoji-datasource-google", cache) as archive:
        noto = members(archive, r"package/(emoji\.json|img/google/64/[^/]+\.png)")
    with fetch("emoji-datasource-twitter", cache) as archive:
        twemoji = members(archive, r"package/img/twitter/64/[^/]+\.png")
    with fetch("fluentui-emoji", cache) as archive:
        fluent = members(archive, r"package/icons/flat/[^/]+\.svg")
    annotations = {}
    for name, folder in (
        ("cldr-annotations-derived-full", "annotationsDerived"),
        ("cldr-annotations-full", "annotations"),
    ):
        with fetch(name, cache) as archive:
            text = members(archive, rf"package/{folder}/en/annotations\.json")
        for emoji, entry in json.loads(text["annotations.json"])[folder]["annotations"].items():
            annotations[emoji.replace("\ufe0f", "")] = entry
    entries = json.loads(noto.pop("emoji.json"))
    return entries, annotations, noto, twemoji, fluent


# ---- pictures


def on_white(image):
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def read_png(data):
    image = on_white(Image.open(io.BytesIO(data)))
    assert image.size == (SIDE, SIDE), image.size
    return image


def read_svg(data):
    """Renders an SVG at the largest of three sizes at which cropping to the frame removes margin only.

    Most Fluent drawings have a margin of a sixteenth; Noto's and Twemoji's have almost none.
    """
    for larger in (72, 68, SIDE):
        frame = draw_svg(data, larger)
        low, high = (larger - SIDE) // 2, (larger + SIDE) // 2
        inside = frame.crop((low, low, high, high))
        if opaque(inside) == opaque(frame):
            break
    return on_white(inside)


def draw_svg(data, side):
    import resvg_py  # pyright: ignore[reportMissingImports]  # optional for the other functions

    png = resvg_py.svg_to_bytes(svg_string=data.decode(), width=side, height=side, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    frame = Image.new("RGBA", (side, side))
    # two drawings are not quite square: centre them
    frame.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return frame


def opaque(image):
    """Number of visible pixels; an alpha of up to 8 of 255 is the edge of a curve and does not count."""
    return sum(image.getchannel("A").histogram()[9:])


def webp(image):
    """Encodes losslessly if that takes no more tar blocks (512 bytes) than lossy, which is common for flat drawings.

    Mean bytes per image over a random sample of 100 bundled drawings of each style:

               lossless  lossy at 70  at 80  at 90  this choice
      Noto         2436          716    867   1212          883
      Twemoji      1700          588    712   1005          715
      Fluent        916          731    883   1211          795

    Lossless are 78 % of the Fluent drawings, 17 % of Twemoji's and 3 % of Noto's. Of the 15.05 MiB of shards 9.83 are
    tar headers, labels and captions, which git and wheels compress well.
    """
    lossy, lossless = io.BytesIO(), io.BytesIO()
    image.save(lossy, "WEBP", quality=QUALITY, method=6)
    image.save(lossless, "WEBP", lossless=True, quality=100, method=6)
    lossy, lossless = lossy.getvalue(), lossless.getvalue()
    return lossless if blocks(lossless) <= blocks(lossy) else lossy


def blocks(data):
    return -(-len(data) // 512)


# ---- concepts


def readable(name):
    """CLDR's text-to-speech name in lower case, with colons rewritten and plain quotes."""
    name = unicodedata.normalize("NFC", name).lower()
    for old, new in (("’", "'"), ("“", '"'), ("”", '"'), (": facing", " facing")):
        name = name.replace(old, new)
    name = re.sub(r"^flag: ", "flag of ", name)
    name = re.sub(r"^keycap: ", "keycap ", name)
    name = re.sub(r": (\w+ hair|beard)$", r" with \1", name)
    name = re.sub(r"^(\w+): bald$", r"bald \1", name)
    return name


def make_concepts(entries, annotations, noto, twemoji):
    """One dict per emoji of the data set, in code-point order."""
    concepts = []
    for entry in entries:
        drawn = entry["has_img_google"] and entry["has_img_twitter"]
        if not drawn or entry["subcategory"] in LEFT_OUT:
            continue
        points = entry["unified"].lower()
        text = "".join(chr(int(point, 16)) for point in points.split("-"))
        annotation = annotations[text.replace("\ufe0f", "")]
        concepts.append(
            {
                "points": points,
                "name": readable(annotation["tts"][0]),
                "spoken": annotation["tts"][0],
                "short": re.sub("[_-]+", " ", entry["short_name"]).strip().lower(),
                "keywords": [word.lower() for word in annotation["default"]],
                "added": tuple(int(part) for part in entry["added_in"].split(".")),
                "noto": read_png(noto[entry["image"]]),
                "twemoji": read_png(twemoji[entry["image"]]),
            }
        )
    return sorted(drop_same_pictures(concepts), key=lambda concept: concept["points"])


def drop_same_pictures(concepts):
    """Keeps the newest of the concepts with equal drawings.

    Twemoji draws all families as one of four outlines without gender, which only the newest names ("adult, child") fit.
    """
    kept, pictures = [], set()
    for concept in sorted(concepts, key=lambda c: ([-part for part in c["added"]], c["points"])):
        both = {(style, concept[style].tobytes()) for style in ("noto", "twemoji")}
        if not both & pictures:
            kept.append(concept)
        pictures |= both
    print(f"left out {len(concepts) - len(kept)} concepts that share a drawing with another")
    return kept


def add_fluent(concepts, fluent):
    """Matches Fluent drawings to concepts by name; among several skin tones takes the yellow one."""
    files = {name.removesuffix(".svg").removesuffix("-default"): name for name in fluent}
    matched = 0
    for concept in concepts:
        stem = FLUENT_NAMES.get(concept["name"], slug(concept["spoken"]))
        if stem in files:
            concept["fluent"] = read_svg(fluent[files[stem]])
            matched += 1
    print(f"matched {matched} Fluent drawings to {len(concepts)} concepts")


def slug(name):
    """Fluent's file name of a CLDR name: "rescue worker’s helmet" -> "rescue-workers-helmet"."""
    name = unicodedata.normalize("NFKD", name.lower())
    name = re.sub("[’“”.!\u0300-\u036f]", "", name).replace("*", "asterisk")
    return re.sub("[^a-z0-9]+", "-", name.replace("&", "and")).strip("-")


def add_captions(concepts):
    """Adds several captions to each concept, its name first, and drops captions shared by several concepts."""
    names = collections.Counter(concept["name"] for concept in concepts)
    assert max(names.values()) == 1, names.most_common(1)
    frequency = collections.Counter(word for concept in concepts for word in concept["keywords"])
    for concept in concepts:
        name = concept["name"]
        words = {word for word in concept["keywords"] if word != name and len(word) > 2}
        # the rarest words are the most specific
        words = sorted(words, key=lambda word: (frequency[word], word))[:KEYWORDS]
        lines = [name, concept["short"], ", ".join(words), f"an emoji of {name}"]
        concept["captions"] = [line for line in dict.fromkeys(lines) if line]
    uses = collections.Counter(line for concept in concepts for line in concept["captions"])
    dropped = 0
    for concept in concepts:
        name, *others = concept["captions"]
        # a name stays even if it is a caption of another concept: it is the class name
        unique = [line for line in others if uses[line] == 1]
        dropped += len(others) - len(unique)
        concept["captions"] = [name, *unique]
    print(f"dropped {dropped} caption lines shared by several concepts")


# ---- files


def held_out(concept):
    digest = hashlib.sha256(concept["points"].upper().encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def write_shards(folder, concepts, styles, shards, with_label):
    """Writes folder/0.tar, ... of all concepts in the given styles; returns the number of samples."""
    folder.mkdir(parents=True)
    samples = []
    for label, concept in enumerate(concepts):
        for style in styles:
            if style in concept:
                files = {"webp": concept[style], "txt": "\n".join(concept["captions"]) + "\n"}
                if with_label:
                    files["cls"] = str(label)
                samples.append((f"{style}-{concept['points']}", files))
    with ThreadPoolExecutor() as pool:  # minutes without threads; the encoder releases the GIL
        encoded = pool.map(webp, [files["webp"] for _, files in samples])
        for (_, files), data in zip(samples, encoded, strict=True):
            files["webp"] = data
    # a shuffle that does not depend on a random generator's version
    samples.sort(key=lambda sample: hashlib.sha256(sample[0].encode()).digest())
    sizes = {}
    for shard in range(shards):
        part = samples[shard::shards]
        sizes[f"{shard}.tar"] = len(part)
        with tarfile.open(folder / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for key, files in part:
                for extension, data in files.items():
                    add_member(archive, f"{key}.{extension}", data)
    (folder / "nshards.txt").write_text(str(shards))
    (folder / "sizes.json").write_text(json.dumps(sizes) + "\n")
    return len(samples)


def add_member(archive, name, data):
    data = data.encode() if isinstance(data, str) else data
    info = tarfile.TarInfo(name)  # mtime, uid and gid are 0, the owner is empty
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_root(root, concepts, splits):
    root.mkdir(parents=True)
    names = [concept["name"] for concept in concepts]
    (root / "classnames.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (root / "dataset_type.txt").write_text("classification\n")
    for split, (styles, shards) in splits.items():
        # labels of the training samples would add 3 MB of tar headers, and training reads none
        count = write_shards(root / split, concepts, styles, shards, with_label=split == "test")
        print(f"{root.name}/{split}: {count} samples of {len(concepts)} concepts")


def build(out, cache):
    entries, annotations, noto, twemoji, fluent = load_sources(cache)
    concepts = make_concepts(entries, annotations, noto, twemoji)
    add_fluent(concepts, fluent)
    add_captions(concepts)
    seen = [concept for concept in concepts if not held_out(concept)]
    unseen = [concept for concept in concepts if held_out(concept)]
    for name in ("emoji", "emoji_unseen"):
        shutil.rmtree(out / name, ignore_errors=True)
    write_root(out / "emoji", seen, {"train": (("noto", "twemoji"), 4), "test": (("fluent",), 2)})
    write_root(out / "emoji_unseen", unseen, {"test": (("noto", "twemoji", "fluent"), 1)})
    tars = [path.stat().st_size for path in sorted(out.glob("emoji*/*/*.tar"))]
    print(f"{sum(tars)} bytes ({sum(tars) / 2**20:.2f} MiB) in {len(tars)} shards")


def first_difference(built, shipped):
    """Name of the first file that differs or exists in one folder only; None if all are equal."""
    names = [
        {path.relative_to(root).as_posix() for path in root.glob("emoji*/**/*") if path.is_file()}
        for root in (built, shipped)
    ]
    for name in sorted(names[0] | names[1]):
        if not (name in names[0] and name in names[1]):
            return name
        if not filecmp.cmp(built / name, shipped / name, shallow=False):
            return name
    return None


def warn_of_other_versions():
    for name, pinned in PINNED.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            die(f"{name} is not installed: pip install {name}=={pinned}")
        if installed != pinned:
            print(f"build_emoji: {name} is {installed}, the bundled shards were built with {pinned}")
    print(f"libwebp {PIL.features.version('webp')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of emoji/ and emoji_unseen/")
    parser.add_argument("--check", action="store_true", help="compare a rebuild with --out, write nothing there")
    parser.add_argument("--cache", type=Path, help="folder that keeps the downloads; default: none is kept")
    args = parser.parse_args()
    warn_of_other_versions()
    with tempfile.TemporaryDirectory() as scratch:
        cache = args.cache or Path(scratch, "cache")
        cache.mkdir(parents=True, exist_ok=True)
        if not args.check:
            build(args.out, cache)
            return
        build(Path(scratch, "built"), cache)
        different = first_difference(Path(scratch, "built"), args.out)
    if different:
        print(f"build_emoji: differs: {different}", file=sys.stderr)
        sys.exit(1)
    print("all files are equal")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a read-only folder, a full disk
        die(error)
