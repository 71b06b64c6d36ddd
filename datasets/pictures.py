"""Picture files in, tensors for a CLIP out: decoding, for every data set; a broken file never stops anything."""

import re
import warnings

import numpy as np
import torch
from PIL import Image

from utils.embed import Samples


def decode_file(path, transform):
    """The picture in a file, transformed, and None; or None and what is wrong with it, the path first."""
    picture, reason = decode(str(path), transform)
    return picture, reason and f"{path}: {reason}"


def decode(file, transform):
    """What `decode_file` gives, of a path as a string or an open file, without the path in the reason."""
    try:
        return transform(read_rgb(file)), None
    except FileNotFoundError:
        return None, "no such file"
    except Exception as error:  # noqa: BLE001  Pillow raises nearly anything on a broken file
        reason = re.sub(r"<_io.BytesIO.*?>", "the picture", str(error)).replace(repr(file), "the file")
        return None, reason or type(error).__name__


def picture_stream(files, first, transform):
    """Yield the pictures in files as `Samples` whose keys are their rows, from `first` on."""
    decoded = [decode_file(path, transform) for path in files]
    yield Samples(list(range(first, first + len(decoded))), [], *collate(decoded))


def collate(decoded):
    """What `decode` gave for B files as one tensor: every tensor that a process hands over takes an open file.

    Returns: (pictures (B, 3, H, W), black where one is broken, or None if all are; B reasons or None).
    """
    pictures, reasons = zip(*decoded, strict=True)
    good = next((picture for picture in pictures if picture is not None), None)
    if good is None:
        return None, list(reasons)
    black = torch.zeros_like(good)
    return torch.stack([black if picture is None else picture for picture in pictures]), list(reasons)


def read_rgb(path):
    """A picture of any mode, at a path or in an open file, as RGB, 8 bits a channel.

    Orientation tags are ignored, as in the paper's code. Grey of 16 bits, 32 bits or floats is scaled to 8 bits rather
    than clipped, transparency is dropped.
    Raises: whatever Pillow does on a broken file; Image.DecompressionBombWarning on one of over 89 megapixels;
        ValueError on nan or infinity.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            if image.mode.startswith("I") or image.mode == "F":
                return _scaled(image)
            if image.mode == "P" and "transparency" in image.info:
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")


def _scaled(image):
    """Grey of more than 8 bits as RGB.

    White is 65535 if the file says that it has 16 bits; else the least of 1 (floats only), 255, 65535 and the largest
    value that leaves no value above white.
    """
    grey = np.asarray(image, dtype=np.float64)
    if not np.isfinite(grey).all():
        raise ValueError("it has pixels that are not finite")
    has_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    whites = (65535,) if has_16_bits else (1, 255, 65535) if image.mode == "F" else (255, 65535)
    white = next((white for white in whites if grey.max() <= white), grey.max())
    return Image.fromarray((grey / white * 255).clip(0, 255).round().astype(np.uint8)).convert("RGB")
