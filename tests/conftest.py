"""What the tests share: a working folder of their own, small caches, tiny CLIPs, drawn data sets, scripts in process.

COCO is read where it is at hand (COCO_ROOT).
"""

import os

# A thread that waits is to sleep: spinning, it takes a core from those that work where others work too. Torch reads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests need no GPU, and a process that has used one must not be forked, as those of ranks and kills are.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import io
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cache_embeddings
import train as train_script
from datasets.registry import DATASETS
from datasets.texts import write_texts
from datasets.write import write_split
from models import METHODS
from utils.cli import run_script
from utils.preprocess import load_clip

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = {
    "embed_dim": 16,
    "quick_gelu": False,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TRAIN_IDS = [51, 3, 20]
VAL_IDS = [
    int(i) for i in np.random.default_rng(0).permutation(1000)[:70]
]  # more than a chunk of 64
WORDS = "a photo of the big small red blue cat dog house tree sky river car star".split()
SHAPES_CLIP = (
    *"--model datasets/shapes/clip.json --pretrained datasets/shapes/clip.safetensors".split(),
    *"--workers 0 --device cpu --precision fp32".split(),
)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def script(workdir, capsys):
    """Calls a script's main as its command line does.

    script(main, "--flag", value, ...) -> (exit status, stdout, last line of stderr); script.stderr is all of it
    """

    def call(main, *arguments):
        capsys.readouterr()
        status = run_script(main, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        call.stderr = captured.err
        return status, captured.out, (captured.err.splitlines() or [""])[-1]

    return call


@pytest.fixture(scope="session")
def coco_root():
    """The folder of a COCO subset, from COCO_ROOT."""
    root = os.environ.get("COCO_ROOT")
    if not root:
        pytest.skip("COCO_ROOT is not set: no COCO files to test with")
    path = Path(root) if Path(root).is_absolute() else REPOSITORY / root
    if not (path / "annotations").is_dir():
        pytest.skip(f"COCO_ROOT={root} has no annotations folder")
    return path


def make_cache(
    name, images=40, captions_per_image=3, dim=64, seed=0, splits=("train", "val"), **changes
):
    """A small cache with some signal in it, under ./embeddings/<name>.

    Images lie in a quarter of the dimensions; a caption is its image's embedding with noise of its own size in all of
    them, and of the same norm: how noisy it is shows in its direction.
    """
    rng = np.random.default_rng(seed)
    for split in splits:
        z = rng.normal(size=(images, dim // 4)) @ np.eye(dim // 4, dim)
        image_of_caption = rng.permutation(np.repeat(np.arange(images), captions_per_image))
        noise = rng.uniform(0.05, 1.0, size=(len(image_of_caption), 1))
        text = z[image_of_caption] + noise * rng.normal(size=(len(image_of_caption), dim))
        text *= np.sqrt(dim) / np.linalg.norm(text, axis=1, keepdims=True)
        content = {
            "image": torch.tensor(z, dtype=torch.float16),
            "text": torch.tensor(text, dtype=torch.float16),
            "image_of_caption": image_of_caption.tolist(),
            "captions": [f"caption {i}" + " word" * (i % 5) for i in range(len(text))],
            "images": [f"{i:04d}.png" for i in range(images)],
            "relevance": None,
            "meta": {"model": "none", "pretrained": "none"},
        }
        write_split(Path("embeddings") / name / split, **(content | changes))
    ladder = torch.tensor(rng.normal(size=(3, dim)), dtype=torch.float16)
    write_texts(
        name, "ladder", ladder, ["a photo", "a photo of a cat", "a photo of a black cat"], {}
    )


def recipe_of(method):
    """The name of the recipe for small caches or, of a method that has none but its authors', of that one."""
    return "small" if "small" in METHODS[method].recipes else "original"


def load_result(name, seed, method):
    """The JSON of a result and its npz as a dict of arrays."""
    folder = Path("results") / name / str(seed)
    return json.loads((folder / f"{method}.json").read_text()), dict(
        np.load(folder / f"{method}.npz")
    )


def all_bytes(folder):
    """The content of all files, hidden ones too, by name."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# CLIPs.


def write_tiny_clip(folder, stem="tiny", **changes):
    """A configuration and random weights: <folder>/<stem>.json and .safetensors.

    Returns: their paths and the open_clip model itself.
    """
    import open_clip

    config, weights = folder / f"{stem}.json", folder / f"{stem}.safetensors"
    config.write_text(json.dumps(CONFIG | changes))
    torch.manual_seed(0)
    model = open_clip.CLIP(**json.loads(config.read_text())).eval()
    with torch.no_grad():
        model.token_embedding.weight.normal_()  # in open_clip's own start all texts are nearly alike
    save_file(model.state_dict(), weights)
    return config, weights, model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny CLIP: the paths of its configuration and weights, and the open_clip model itself."""
    return write_tiny_clip(tmp_path_factory.mktemp("clip"), "tiny-cache")


def direct_texts(model, texts):
    """Embeddings one text at a time with open_clip's own tokenizer."""
    import open_clip

    with torch.no_grad():
        return torch.cat(
            [model.encode_text(open_clip.tokenize([text], context_length=16)) for text in texts]
        )


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# Data sets in COCO's format.


def draw_data(
    root, splits=(("train", TRAIN_IDS), ("val", VAL_IDS)), layout=DATASETS["shapes"].layout
):
    """A data set in COCO's format: pictures are noise of their own and of their own size, ids and names in no order."""
    for split, ids in splits:
        rng = np.random.default_rng(len(ids))
        folder, captions_file = (
            root / layout.images.format(split=split),
            root / layout.captions.format(split=split),
        )
        folder.mkdir(parents=True)
        captions_file.parent.mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for image_id in ids:
            name = f"{rng.integers(10**9):09d}.png"
            blocks = Image.fromarray(rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8))
            size = int(rng.integers(32, 50)), int(rng.integers(32, 50))
            blocks.resize(size, Image.Resampling.NEAREST).save(folder / name)
            images.append({"id": image_id, "file_name": name})
            for text in (
                " ".join(rng.choice(WORDS, size=5)),
                "a photo of a cat",
            ):  # the second is every picture's
                annotations.append(
                    {"id": int(rng.integers(10**9)), "image_id": image_id, "caption": text}
                )
        rng.shuffle(annotations)
        captions_file.write_text(json.dumps({"images": images, "annotations": annotations}))
        if layout.relevance and split == "val":
            relevance = {
                entry["id"]: [entry["image_id"]]
                if entry["caption"] != "a photo of a cat"
                else sorted(ids)
                for entry in annotations
            }
            (root / layout.relevance.format(split=split)).write_text(json.dumps(relevance))
    return root


def plain_split(root, split):
    """The split by plain json: images in order of id, captions in order of id with their image's row."""
    document = json.loads((root / "annotations" / f"captions_{split}.json").read_text())
    images = sorted(document["images"], key=lambda image: image["id"])
    annotations = sorted(document["annotations"], key=lambda annotation: annotation["id"])
    row_of = {image["id"]: row for row, image in enumerate(images)}
    return images, annotations, [row_of[annotation["image_id"]] for annotation in annotations]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A drawn data set of the splits train and val, which no test changes."""
    return draw_data(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def call(script, data, tiny, monkeypatch, capsys):
    """Calls cache_embeddings.py on the drawn data set with the tiny CLIP; later flags win.

    call(...) -> (exit status, stdout, last line of stderr); call.stderr(...) -> (exit status, all of stderr)
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    few_texts = replace(DATASETS["shapes"], chains=None)  # a thousand texts more, for every cache
    monkeypatch.setitem(DATASETS, "shapes", few_texts)
    flags = [
        "--dataset",
        "shapes",
        "--data-root",
        data,
        "--model",
        tiny[0],
        "--pretrained",
        tiny[1],
    ]
    flags = [str(flag) for flag in flags] + "--device cpu --workers 0".split()

    def with_flags(*more):
        return script(cache_embeddings.main, *flags, *more)

    def stderr(*more):
        capsys.readouterr()
        status = run_script(cache_embeddings.main, [*flags, *map(str, more)])
        return status, capsys.readouterr().err

    with_flags.flags, with_flags.stderr = flags, stderr
    return with_flags


# Data sets with Karpathy's splits.


@pytest.fixture
def without_eccv_caption(monkeypatch):
    """Whether the package is installed must not matter."""
    monkeypatch.setitem(sys.modules, "eccv_caption", None)


# (imgid, cocoid, folder, split, [(sentid, raw)]): neither ids nor splits are in order, and the order of imgids is not
# that of cocoids.
ENTRIES = [
    (4, 40, "val2014", "test", [(9, "a red square"), (2, "a picture")]),
    (1, 70, "val2014", "test", [(11, "a blue circle\n")]),
    (3, 10, "train2014", "train", [(8, "a star"), (1, "a big star")]),
    (0, 30, "val2014", "restval", [(12, "a small circle")]),
    (5, 20, "val2014", "val", [(3, "a square 🐈")]),
    (2, 60, "val2014", "test", []),
]


def karpathy_document():
    return {
        "dataset": "made here",
        "images": [
            {
                "filename": f"{cocoid}.png",
                "filepath": folder,
                "split": split,
                "imgid": imgid,
                "cocoid": cocoid,
                "sentids": [sentid for sentid, _ in sentences],
                "sentences": [
                    {"raw": raw, "tokens": raw.split(), "sentid": sentid, "imgid": imgid}
                    for sentid, raw in sentences
                ],
            }
            for imgid, cocoid, folder, split, sentences in ENTRIES
        ],
    }


def draw(path, shade):
    """A picture of noise; of another shade another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(shade).integers(0, 256, size=(16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((64, 64), 0).save(path)


def write_karpathy_coco(root, content=None):
    """The files of coco-karpathy under root. content: a document or the text of its file."""
    for _, cocoid, folder, _, _ in ENTRIES:
        draw(root / folder / f"{cocoid}.png", cocoid)
    text = content if isinstance(content, str) else json.dumps(content or karpathy_document())
    (root / "dataset_coco.json").write_text(text, encoding="utf-8")
    return root


def write_flickr30k(root, folder="flickr30k-images", content=None):
    """The files of flickr30k under root: those of COCO without cocoid and filepath."""
    content = content or karpathy_document()
    for image in content["images"]:
        draw(root / folder / image["filename"], image.pop("cocoid"))
        del image["filepath"]
    (root / "dataset_flickr30k.json").write_text(json.dumps(content), encoding="utf-8")
    return root


# Tars.


def write_tar(path, samples):
    """Args: samples: {file name: bytes}, in order."""
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


# Rows of pictures, and COCO's.


def check_rows(cache, file_of_caption):
    """Check that every caption's row is the embedding of its own picture by the built-in CLIP, one picture at a time.

    Args: file_of_caption: M (text, file), in the order of the rows.
    """
    assert cache.captions == [text for text, _ in file_of_caption]
    clip = load_clip("datasets/shapes/clip.json", "datasets/shapes/clip.safetensors")
    files = sorted({file for _, file in file_of_caption})
    with torch.no_grad():
        distinct = [
            clip.model.encode_image(clip.transform(Image.open(f).convert("RGB"))[None])
            for f in files
        ]
    expected = torch.cat([distinct[files.index(file)] for _, file in file_of_caption])
    found = cache.image[cache.image_of_caption].float()
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-3)
    distinct = torch.cat(distinct)
    assert (
        torch.cdist(distinct, distinct).fill_diagonal_(9).min() > 0.5
    )  # so that no row fits another picture


def coco_sample(coco_root, count=20):
    """Some COCO pictures with their captions by plain json: [(id, file, [(annotation id, caption)])]."""
    plain = json.loads(
        (coco_root / "annotations" / "captions_val2017.json").read_text(encoding="utf-8")
    )
    captions = {}
    for annotation in plain["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(
            (annotation["id"], annotation["caption"])
        )
    images = plain["images"][:: len(plain["images"]) // count][:count]
    return [
        (image["id"], coco_root / "val2017" / image["file_name"], captions[image["id"]])
        for image in images
    ]


QUICK = ("--dataset", "tiny", "--recipe", "small", "--epochs", 2, "--batch-size", 50)
LONG = (*QUICK, "--epochs", 7, "--save-every", 2)
TRAIN = ("--dataset", "tiny", "--recipe", "small", "--epochs", 1, "--batch-size", 60)


@pytest.fixture
def trained(script):
    """A small cache with two seeds of a method whose images are points and of one whose images are uncertain."""
    make_cache(
        "tiny",
        relevance=[
            [i // 3, 39 - i // 3] if i // 3 != 39 - i // 3 else [i // 3] for i in range(120)
        ],
    )
    rng = np.random.default_rng(0)
    z = torch.tensor(rng.normal(size=(12, 64)), dtype=torch.float16)
    write_texts(
        "tiny",
        "steps",
        z,
        [f"text {i}" for i in range(12)],
        {},
        [[0, 1, 2, 3], [4, 5], [6, 7, 8], [9, 10, 11]],
    )
    assert (
        script(train_script.main, *TRAIN, "--method", "asymvlm-psd", "pfe", "--seed", 0, 1)[0] == 0
    )
    return ("--method", "asymvlm-psd", "pfe", "--seed", 0, 1)


def picture_files(cache, folder):
    """Write a picture for every image of a cache, its row as its grey, and tell the cache where they are."""
    folder.mkdir()
    for row, name in enumerate(cache.images):
        Image.new("RGB", (8, 8), (row, row, row)).save(folder / name)
    cache.meta["image_folder"] = f"{folder}/"


@pytest.fixture
def one_thread():
    """Small steps are fastest so, above all where other processes want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stop_in_epoch(monkeypatch, number, act):
    """Let training meet act(losses) when the losses of an epoch are looked at."""
    check = train_script.check_finite

    def check_or_act(losses, adaptor, method, epoch):
        check(act(losses) if epoch == number else losses, adaptor, method, epoch)

    monkeypatch.setattr(train_script, "check_finite", check_or_act)


def die(_):
    raise SystemExit  # leaves what a kill leaves: nothing is saved on the way out


def read_log(method="asymvlm-psd"):
    lines = Path(f"checkpoints/tiny/0/{method}.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key != "seconds"}
        for line in lines
    ]


def interrupt(_):
    raise KeyboardInterrupt
