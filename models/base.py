"""The contract: what a method must give so that train.py, eval.py and a researcher can use it without knowing which one it is."""

from dataclasses import dataclass

from torch import nn

from models.layers import at_least_float32, cosine_similarity


@dataclass(frozen=True)
class Recipe:
    """How a method is trained.

    optimizer: "sgd" or "adamw". lr, weight_decay: the first on a cosine, step by step, from lr to min_lr; the second on every parameter.
    batch_size: pairs a step. epochs: passes over the captions. momentum: of SGD.
    """

    optimizer: str
    lr: float
    weight_decay: float
    batch_size: int = 2048
    epochs: int = 200
    momentum: float = 0.9
    min_lr: float = 1e-6


# For caches under some 100,000 captions, where the paper's recipe (289 steps an epoch on COCO) starves: the same for all methods.
SMALL = Recipe("adamw", lr=1e-3, weight_decay=0.05, batch_size=1024, epochs=10)


class Adaptor(nn.Module):
    """A head on frozen CLIP embeddings that knows how uncertain it is.

    A method subclasses this and gives `recipes`, `encode_image`, `encode_text`, `describe_text` and `loss`; `describe_image` if its images
    are uncertain too, and `score` if it ranks by something else than the cosine of the means. Embeddings z are (N, D), raw, of any float
    type; half precision is raised to float32 before any log, exp, norm or sum, and float64 stays float64.

    Args: embed_dim: D, the width of the CLIP embeddings.
    """

    recipes: dict  # name -> Recipe; "paper" and "small" at least

    def __init__(self, embed_dim=512):
        super().__init__()
        self.embed_dim = embed_dim

    def encode_image(self, z):
        """Image embeddings to the parameters of their distributions. Args: z (N, D). Returns: tuple of (N, ...) tensors."""
        raise NotImplementedError

    def encode_text(self, z):
        """Text embeddings to the parameters of their distributions. Args: z (N, D). Returns: tuple of (N, ...) tensors."""
        raise NotImplementedError

    def describe_image(self, *encoded):
        """Mean (N, D) and uncertainty (N,), or None where images have none, of what `encode_image` returned."""
        return encoded[0], None

    def describe_text(self, *encoded):
        """Mean (N, D) and uncertainty (N,) of what `encode_text` returned; larger = less certain."""
        raise NotImplementedError

    def loss(self, *encoded):
        """The training loss of B true pairs. Args: what `encode` returned, rows in the same order. Returns: tensor ()."""
        raise NotImplementedError

    def score(self, image, text):
        """How well images and texts match. Args: what `encode_image` (N) and `encode_text` (M) returned. Returns: (N, M), larger = better."""
        return cosine_similarity(image[0], text[0])

    # What follows is the same for every method.

    def encode(self, z_image, z_text):
        """B pairs of embeddings, each (B, D), to the arguments of `loss`. Returns: tuple of (B, ...) tensors."""
        return (*self.encode_image(at_least_float32(z_image)), *self.encode_text(at_least_float32(z_text)))

    def forward(self, z_image, z_text):
        """The training loss, (), of B true pairs of embeddings, each (B, D)."""
        return self.loss(*self.encode(z_image, z_text))

    def adapt_image(self, z):
        """Image embeddings (N, D) to mean (N, D) and uncertainty (N,) or None."""
        return self.describe_image(*self.encode_image(at_least_float32(z)))

    def adapt_text(self, z):
        """Text embeddings (N, D) to mean (N, D) and uncertainty (N,); larger = less certain."""
        return self.describe_text(*self.encode_text(at_least_float32(z)))

    def similarity(self, z_image, z_text):
        """Retrieval scores of all pairs. Args: z_image (N, D), z_text (M, D). Returns: (N, M), larger = better match."""
        return self.score(self.encode_image(at_least_float32(z_image)), self.encode_text(at_least_float32(z_text)))
