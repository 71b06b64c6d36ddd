"""Decode image files to tensors for a CLIP, for every data set.

A broken file gives a reason, not an exception.
"""

import os
import re
import unicodedata
import warnings

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from utils.embed import Samples

# Colour profiles and texts in a PNG may be longer than Pillow's 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = 64 * 2**20


def decode_file(path, transform):
    """The transformed image of a file and None; or None and what is wrong with it."""
    return decode(find_file(str(path)), transform)


def decode(file, transform):
    """Like `decode_file`, for a path (str) or an open file."""
    try:
        return transform(read_rgb(file)), None
    except FileNotFoundError:
        return None, f"no such file{_likely_cause(file)}"
    except Exception as error:  # noqa: BLE001  Pillow raises nearly anything on a broken file
        reason = re.sub(r"<_io.BytesIO.*?>", "the image", str(error))
        reason = reason.replace(repr(file), "the file")
        return None, reason or type(error).__name__


def find_file(path):
    """The path itself, or that of the same name in another Unicode normal form if that exists."""
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, path)
        if other != path and not os.path.exists(path) and os.path.exists(other):
            return other
    return path


def _likely_cause(path):
    """Why a file may not be there, for a message."""
    name = str(path)
    if re.search(r"https?:/", name):
        return "; it is a URL: download the images first, and name the files"
    if "\\" in name:
        return "; it has backslashes: write the path with /"
    if name != name.rstrip():
        return "; its name ends in a space: remove it"
    return ""


def image_stream(files, first, transform):
    """Yield the images of files as `Samples`; their keys are rows, from `first` on."""
    images, reasons = collate([decode_file(path, transform) for path in files])
    rows = list(range(first, first + len(files)))
    yield Samples(rows, [], images, reasons)


def collate(decoded):
    """Stack what `decode` returned for B files.

    Returns: a numpy array (B, 3, H, W), zeros where an image is broken, or None if all are; B
        reasons or None.
    """
    images = [image for image, _ in decoded]
    reasons = [reason for _, reason in decoded]
    good = [image for image in images if image is not None]
    if not good:
        return None, reasons
    blank = torch.zeros_like(good[0])
    stacked = torch.stack([blank if image is None else image for image in images])
    return stacked.numpy(), reasons


def read_rgb(path):
    """An image of any mode as RGB, 8 bits per channel.

    Orientation tags are ignored, as in the paper's code. Grey of 16 bits, 32 bits or floats is
    scaled to 8 bits rather than clipped; transparency is dropped.

    Args:
        path: a path, or an open file.
    Raises: whatever Pillow raises on a broken file; Image.DecompressionBombWarning on an image of
        over 89 megapixels; ValueError on NaN or infinity.
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

    White is 65535 if the file says that it has 16 bits. Otherwise it is the first of 1 (floats
    only), 255 and 65535 that no pixel exceeds, or else the largest pixel.
    """
    grey = np.asarray(image, dtype=np.float64)
    if not np.isfinite(grey).all():
        raise ValueError("it has pixels that are not finite")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        whites = (65535,)
    elif image.mode == "F":
        whites = (1, 255, 65535)
    else:
        whites = (255, 65535)
    largest = grey.max()
    white = next((white for white in whites if largest <= white), largest)
    pixels = (grey / white * 255).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB")
