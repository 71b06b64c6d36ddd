"""Train the small CLIP of the built-in data set on scenes that are drawn on the fly.

The model, tokenizer and loss are open_clip's. A patch of the vision transformer is a cell of the
world's grid. The scenes are drawn as those of the data set, with other seeds; half of their
captions are full descriptions, half are of random detail.

    python -m datasets.shapes.pretrain --out weights.pt

Without --out, it replaces the shipped weights.

The shipped weights come from this command with OMP_NUM_THREADS=1 (another number of threads gives
other weights, about as good), when captions were drawn less evenly and with more hypernyms than
now. Its last line then, with R@1 of the data set's 1,000 val images and their full descriptions:

    {"step": 2000, "loss": 1.8492, "R@1 t2i": 0.87, "R@1 i2t": 0.861, "seconds": 1736.6908}
"""

import argparse
import json
import math
import random
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from tqdm import trange

from datasets.shapes.world import (
    draw_scene,
    make_split,
    paint,
    write_caption,
    write_full_description,
)

FOLDER = Path(__file__).parent
MAX_LOG_SCALE = math.log(100)  # as in CLIP: the logit scale never exceeds 100


def train(config, steps, batch, lr, seed, evaluate_every=250):
    """Train a CLIP.

    Args:
        config: path of an open_clip model configuration. seed: int.
        steps, batch: optimiser steps, pairs a step. lr: peak learning rate.
    Returns: (open_clip model, (vocabulary size,) bool: the tokens that training has met).
    """
    torch.manual_seed(seed)
    open_clip.add_model_config(config)
    name = Path(config).stem
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    met = torch.zeros(model.vocab_size, dtype=torch.bool)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    clip_loss = open_clip.ClipLoss()
    rng = random.Random(f"pretrain/{seed}")
    with trange(steps, desc="pretraining", unit="step") as bar:
        for step in bar:
            scenes = [draw_scene(rng) for _ in range(batch)]
            images = torch.stack([transform(paint(scene)) for scene in scenes])
            texts = []
            for scene in scenes:
                write = write_full_description if rng.random() < 0.5 else write_caption
                texts.append(write(scene, rng).text)
            tokens = tokenizer(texts)
            met[tokens.flatten()] = True
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z_image, z_text, scale = model(images, tokens)
            loss = clip_loss(z_image.float(), z_text.float(), scale)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOG_SCALE)
            if (step + 1) % evaluate_every == 0 or step + 1 == steps:
                t2i, i2t = recall(model, transform, tokenizer)
                record = {
                    "step": step + 1,
                    "loss": loss.item(),
                    "R@1 t2i": t2i,
                    "R@1 i2t": i2t,
                    "seconds": bar.format_dict["elapsed"],
                }
                bar.write(json.dumps({key: round(value, 4) for key, value in record.items()}))
    return model, met


@torch.inference_mode()
def recall(model, transform, tokenizer, images=1000):
    """R@1 between the data set's val images and their full descriptions.

    Returns: (text-to-image, image-to-text), each in [0, 1].
    """
    model.eval()
    scenes = [image["scene"] for image in make_split(0, "val", images)["images"]]
    texts = [write_full_description(scene, random.Random(i)).text for i, scene in enumerate(scenes)]
    z_image = model.encode_image(
        torch.stack([transform(paint(scene)) for scene in scenes]), normalize=True
    )
    z_text = model.encode_text(tokenizer(texts), normalize=True)
    model.train()
    similarity = z_image @ z_text.T  # (N_image, M_text)
    target = torch.arange(images)
    text_to_image = (similarity.argmax(dim=0) == target).float().mean().item()
    image_to_text = (similarity.argmax(dim=1) == target).float().mean().item()
    return text_to_image, image_to_text


def save(model, met, path):
    """Write the weights as float16, with zeros for tokens that training has never seen."""
    weights = {
        name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    weights["token_embedding.weight"][~met] = 0
    save_file(weights, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the built-in data set's CLIP.")
    parser.add_argument("--config", default=str(FOLDER / "clip.json"))
    parser.add_argument("--out", default=str(FOLDER / "clip.safetensors"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    save(*train(args.config, args.steps, args.batch, args.lr, args.seed), args.out)
