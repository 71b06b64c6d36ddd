"""The contract: what a method gives, so that train.py, eval.py and a researcher need not know which one it is."""

import math
from dataclasses import dataclass, replace

from torch import nn

from models.layers import at_least_float32, cosine_similarity, mlp, total_variance, unit


@dataclass(frozen=True)
class Recipe:
    """How a method is trained."""

    optimizer: str  # "sgd", "adam" or "adamw"
    lr: float  # falls to min_lr on a cosine, step by step, if `drops` does not say otherwise
    weight_decay: float  # on every parameter, if `decayed_from` does not say otherwise
    batch_size: int = 2048  # pairs a step
    epochs: int = 200  # passes over the captions
    momentum: float = 0.9  # of SGD
    min_lr: float = 1e-6
    start_variance: float | None = None  # before the first step, all dimensions together; None: as the layers give it
    drops: tuple | None = None  # shares of the steps, after each of which lr is a tenth; (): constant; None: the cosine
    warm_up: float = 0.0  # share of the steps in which lr rises from 0 on a line, before the cosine of the others
    betas: tuple = (0.9, 0.999)  # of Adam and AdamW
    decayed_from: int = 0  # dimensions that a decayed parameter has at least: 1: no learnt scalars, 2: matrices alone
    clip_norm: float | None = None  # of the gradient
    ramped_epoch: int | None = None  # in which the loss is weighted from 0 to 1
    averaged_after: float = 1.0  # share of the epochs: the weights at the end of each later one are averaged
    max_steps: int | None = None  # an epoch

    def steps(self, captions):
        """Steps of an epoch over so many captions; the last batch may be smaller."""
        return min(-(-captions // self.batch_size), self.max_steps or captions)


# For caches under some 100,000 captions, where the paper's recipe (289 steps an epoch on COCO) starves; and for a look.
SMALL = Recipe("adamw", lr=1e-3, weight_decay=0.05, batch_size=1024, epochs=10)
DEMO = replace(SMALL, batch_size=256, epochs=1)


def recipes_of(paper, lr, start_variance=None):
    """The recipes of a method: the paper repository's; SMALL with this learning rate; and DEMO."""
    small, demo = (replace(recipe, start_variance=start_variance) for recipe in (SMALL, DEMO))
    return {"paper": paper, "small": replace(small, lr=lr), "demo": demo}


class Adaptor(nn.Module):
    """A head on frozen CLIP embeddings, embed_dim = D wide, that knows how uncertain it is.

    A method subclasses this and gives `recipes`, `encode_image`, `encode_text`, `describe_text` and `loss`;
    `describe_image` if its images are uncertain, as one modality at least is; `score` if it ranks by something else
    than the cosine of the means; and `own_score` if its authors do. Embeddings z are (N, D), raw, of any float type:
    half precision is raised to float32, float64 stays float64.
    """

    recipes: dict  # name -> Recipe: "paper" and "small" at least, or "original" alone

    def __init__(self, embed_dim=512):
        super().__init__()
        self.embed_dim = embed_dim

    def encode_image(self, z):
        """Image embeddings z (N, D) to the parameters of their distributions, a tuple of (N, ...) tensors."""
        raise NotImplementedError

    def encode_text(self, z):
        """Text embeddings z (N, D) to the parameters of their distributions, a tuple of (N, ...) tensors."""
        raise NotImplementedError

    def describe_image(self, *encoded):
        """Mean (N, D) and uncertainty (N,), or None where images have none, of what `encode_image` returned."""
        return encoded[0], None

    def describe_text(self, *encoded):
        """Mean (N, D) and uncertainty (N,), or None where texts have none, of what `encode_text` returned."""
        raise NotImplementedError

    def loss(self, *encoded):
        """The training loss, (), of what `encode` returned for B true pairs."""
        raise NotImplementedError

    def score(self, image, text):
        """How well N images match M texts, (N, M), larger = better, float32 at least, from what the encoders return."""
        return cosine_similarity(image[0], text[0])

    def own_score(self, image, text):
        """The same by the score that the method's own authors rank by, which their variances enter."""
        return self.score(image, text)

    def start_at(self, variance):
        """Let every distribution start with this variance, summed over the dimensions; None: leave it as it is."""
        if variance is not None:
            raise NotImplementedError(f"{type(self).__name__} has no start_variance")

    # What follows is the same for every method.

    def encode(self, z_image, z_text):
        """B pairs of embeddings, each (B, D), to the arguments of `loss`, a tuple of (B, ...) tensors."""
        return (*self.encode_image(at_least_float32(z_image)), *self.encode_text(at_least_float32(z_text)))

    def forward(self, z_image, z_text):
        """The training loss, (), of B true pairs of embeddings, each (B, D)."""
        return self.loss(*self.encode(z_image, z_text))

    def adapt_image(self, z):
        """Image embeddings (N, D) to mean (N, D) and uncertainty (N,) or None."""
        return self.describe_image(*self.encode_image(at_least_float32(z)))

    def adapt_text(self, z):
        """Text embeddings (N, D) to mean (N, D) and uncertainty (N,) or None; larger = less certain."""
        return self.describe_text(*self.encode_text(at_least_float32(z)))

    def similarity(self, z_image, z_text):
        """Retrieval scores of all pairs, z_image (N, D) and z_text (M, D) -> (N, M); larger = better match."""
        return self.score(self.encode_image(at_least_float32(z_image)), self.encode_text(at_least_float32(z_text)))


class GaussianAdaptor(Adaptor):
    """What PCME++ and ProLIP share: every embedding becomes a diagonal Gaussian. A subclass gives `recipes` and `loss`.

    mean = unit(z), log_var = MLP(unit(z)), (N, D) each; uncertainty = mean_d exp(log_var).
    """

    trunk = staticmethod(mlp)  # embed_dim -> Sequential, (N, D) -> (N, D), that ends in a linear layer

    def __init__(self, embed_dim=512):
        super().__init__(embed_dim)
        self.image_head = nn.ModuleDict({"log_var": self.trunk(embed_dim)})
        self.text_head = nn.ModuleDict({"log_var": self.trunk(embed_dim)})

    def encode_image(self, z):
        mean = unit(z)
        return mean, self.image_head["log_var"](mean)

    def encode_text(self, z):
        mean = unit(z)
        return mean, self.text_head["log_var"](mean)

    def start_at(self, variance):
        for head in (self.image_head, self.text_head) if variance is not None else ():
            nn.init.constant_(head["log_var"][-1].bias, math.log(variance / self.embed_dim))

    def describe_text(self, mean, log_var):
        return mean, total_variance(log_var) / self.embed_dim

    describe_image = describe_text


def total_loss(loss):
    """The training loss, a tensor (): the sum of the terms if a method names them."""
    if isinstance(loss, dict):
        return sum(loss.values())
    return loss
