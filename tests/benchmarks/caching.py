"""How much of the encoder's own rate cache_embeddings.py reaches, with a random ViT-B/32 and COCO's pictures and texts.

    COCO_ROOT=<a COCO folder> python -m tests.benchmarks.caching

The pictures are COCO's, scaled to 640 x 480 (drawn ones without COCO_ROOT). "Bare" is a loop of encode_image over
tensors that are ready, in the same precision; "float32" the same loop in float32. Texts are COCO's captions (the
built-in data set's without COCO_ROOT), encoded no longer than they are, and all at the context length.
"""

import json
import os
import random
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from datasets.shapes import world
from datasets.source import UNIT, ListUnit
from datasets.units import UnitStore
from tests.benchmarks.machine import describe, in_turn, markdown_table
from utils.device import pick_device, pick_precision, precision_name
from utils.embed import CHUNK, embed_units, encode_tokens, in_chunks, text_ends
from utils.preprocess import load_clip, tokenize

MODEL, PICTURES, TEXTS = "ViT-B-32-quickgelu", 512, UNIT
SOME = 512  # texts that are also encoded at the context length


def make_pictures(folder, count):
    """Write JPEG files of 640 x 480 pixels. Returns: their paths."""
    sources = (
        sorted(Path(os.environ["COCO_ROOT"]).glob("*2017/*.jpg"))[:count]
        if os.environ.get("COCO_ROOT")
        else []
    )
    files = []
    for i in range(count):
        if i < len(sources):
            picture = Image.open(sources[i]).convert("RGB")
        else:
            picture = world.paint(world.draw_scene(random.Random(i)))
        files.append(folder / f"{i:04d}.jpg")
        picture.resize((640, 480), Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


def some_texts(count):
    """So many different captions."""
    file = Path(os.environ.get("COCO_ROOT", ".")) / "annotations/captions_train2017.json"
    document = (
        json.loads(file.read_text()) if file.exists() else world.make_split(0, "train", count)
    )
    return list(dict.fromkeys(entry["caption"] for entry in document["annotations"]))[:count]


def main(repeats=3):
    device = pick_device("auto")
    precision = pick_precision("auto", device)
    print(describe(), "\n")
    with tempfile.TemporaryDirectory() as folder:
        import open_clip
        from safetensors.torch import save_file

        weights = Path(folder) / "random.safetensors"
        save_file(open_clip.create_model(MODEL, pretrained=None).state_dict(), weights)
        files = make_pictures(Path(folder), PICTURES)
        clip, wide = (
            load_clip(MODEL, str(weights), device, dtype) for dtype in (precision, torch.float32)
        )
        ready = torch.randn(CHUNK, 3, 224, 224)

        def bare(some_clip, dtype, chunks):
            with torch.inference_mode():
                for _ in range(chunks):
                    some_clip.model.encode_image(ready.to(device, dtype))

        def cache():
            store = UnitStore(Path(folder) / "split", {}, torch.float16)
            embed_units([ListUnit("image", 0, files)], clip, store, CHUNK, workers)
            store.remove()

        tokens, bar = tokenize(clip.tokenizer, some_texts(TEXTS))[0], tqdm(disable=True)

        def full_length():
            with torch.inference_mode():
                in_chunks(clip.model.encode_text, tokens[:SOME], device)

        def short():
            with torch.inference_mode():
                encode_tokens(clip, tokens, bar)

        chunks, workers = PICTURES // CHUNK, os.cpu_count()
        times = in_turn(
            {
                "cache": cache,
                "bare": lambda: bare(clip, precision, chunks),
                "float32": lambda: bare(wide, torch.float32, chunks),
            },
            repeats,
        )
        text_times = in_turn(
            {"texts at their length": short, "at the context length": full_length}, repeats=1
        )
    rates = {name: PICTURES / median for name, (median, _, _) in times.items()}
    rows = [[name, f"{rate:.1f}", f"{rates['cache'] / rate:.2f}"] for name, rate in rates.items()]
    print(
        markdown_table(
            [f"{MODEL}, {precision_name(precision)}", "images/s", "cache_embeddings.py over this"],
            rows,
        )
    )
    counts = {"texts at their length": len(tokens), "at the context length": min(SOME, len(tokens))}
    rates = {name: counts[name] / median for name, (median, _, _) in text_times.items()}
    rows = [
        [name, f"{rate:.0f}", f"{max(rates.values()) / rate:.2f}"] for name, rate in rates.items()
    ]
    mean = text_ends(clip.model, tokens).float().mean().item()
    print(
        f"\n{markdown_table([f'{len(tokens)} texts of {mean:.1f} tokens', 'texts/s', 'the first over this'], rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
