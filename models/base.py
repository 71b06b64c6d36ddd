"""What every method provides, so that train.py, eval.py and a researcher can use any of them."""

import math
from dataclasses import dataclass, replace

from torch import Tensor, nn

from models.layers import at_least_float32, cosine_similarity, mlp, total_variance, unit

Encoded = tuple[Tensor, ...]  # the parameters of N distributions, (N, ...) each
Loss = Tensor | dict[str, Tensor]  # (), or the terms of the loss by name, whose sum is the loss


@dataclass(frozen=True)
class Recipe:
    """How a method is trained.

    Attributes:
        optimizer: "sgd", "adam" or "adamw".
        lr: the highest learning rate. It follows a cosine down to `min_lr`, unless `drops` is set.
        weight_decay: applied to every parameter, unless `decayed_from` is set.
        batch_size: pairs per step.
        epochs: passes over the captions.
        momentum: of SGD.
        min_lr: the learning rate at the end of the cosine.
        start_variance: the variance of every distribution before the first step, summed over the
            dimensions. None leaves the layers as they are initialised.
        drops: fractions of the steps after which the learning rate is divided by ten. An empty
            tuple keeps it constant, None selects the cosine.
        warm_up: fraction of the steps in which the learning rate rises linearly from 0.
        betas: of Adam and AdamW.
        eps: of Adam and AdamW.
        decayed_from: weight decay applies to parameters with at least this many dimensions: 1
            leaves out learned scalars, 2 all but matrices.
        clip_norm: the largest norm of the gradient. None does not clip it.
        ramped_epoch: the epoch, from 1, in which the weight of the loss rises linearly to 1, from 1
            over the number of steps. Before and after it, the weight is 1.
        averaged_after: fraction of the epochs after which the weights are averaged, one set of
            weights per epoch; 1.0 averages none.
        max_steps: the largest number of steps per epoch.
        batch_share: the largest share of the captions in a batch. None sets no limit.
        min_steps: the smallest number of steps of the whole run, for which epochs are added.
    """

    optimizer: str
    lr: float
    weight_decay: float
    batch_size: int = 2048
    epochs: int = 200
    momentum: float = 0.9
    min_lr: float = 1e-6
    start_variance: float | None = None
    drops: tuple | None = None
    warm_up: float = 0.0
    betas: tuple = (0.9, 0.999)
    decayed_from: int = 0
    clip_norm: float | None = None
    ramped_epoch: int | None = None
    averaged_after: float = 1.0
    max_steps: int | None = None
    batch_share: float | None = None
    min_steps: int | None = None
    eps: float = 1e-8

    def fitted_to(self, captions, fixed=()):
        """The recipe for this many captions: `batch_share` and `min_steps` are applied.

        Args: fixed: names of fields that a user has set, which stay as they are.
        """
        fitted = self
        if self.batch_share is not None and "batch_size" not in fixed:
            largest = max(2, int(self.batch_share * captions))
            fitted = replace(fitted, batch_size=min(self.batch_size, largest))
        if self.min_steps is not None and "epochs" not in fixed:
            epochs = math.ceil(self.min_steps / fitted.steps(captions))
            fitted = replace(fitted, epochs=max(self.epochs, epochs))
        return fitted

    def steps(self, captions):
        """Steps per epoch over this many captions. The last batch may be smaller."""
        steps = math.ceil(captions / self.batch_size)
        if self.max_steps is None:
            return steps
        return min(steps, self.max_steps)


# For caches of fewer than about 100,000 captions, for which the paper's recipe has too few steps.
# models/README.md says how it was chosen.
SMALL = Recipe(
    "adamw",
    lr=1e-3,
    weight_decay=0.05,
    batch_size=1024,
    epochs=10,
    batch_share=1 / 8,
    min_steps=150,
)
DEMO_EPOCHS = 5  # of `demo`, for a first look, or as many as make min_steps


def recipes_of(paper, lr=SMALL.lr, start_variance=None):
    """The recipes of a method: the paper repository's, SMALL with this learning rate, and demo."""
    small = replace(SMALL, lr=lr, start_variance=start_variance)
    return {"paper": paper, "small": small, "demo": replace(small, epochs=DEMO_EPOCHS)}


def total_loss(loss: Loss) -> Tensor:
    """The value to minimise, (): the sum of the terms if `loss` is a dict, else `loss` itself."""
    if isinstance(loss, dict):
        return sum(loss.values())
    return loss


class Adaptor(nn.Module):
    """A head on frozen CLIP embeddings that also estimates how uncertain each of them is.

    A method subclasses this and defines `recipes`, `encode_image`, `encode_text`, `describe_text`
    and `loss`. It also defines `describe_image` if its images are uncertain, `score` if it does not
    rank by the cosine of the means, and `own_score` if its authors rank by another score. At least
    one modality has an uncertainty.

    Embeddings z are (N, D), where D is `embed_dim`. They are not normalised and may have any
    floating-point type: half precision is raised to float32, and float64 stays float64.
    """

    recipes: dict[str, Recipe]  # "paper" and "small" at least, or "original" alone
    # Whether `score` is the cosine of the frozen embeddings, which training does not change.
    ranks_by_frozen_cosine: bool = False
    # Whether only one process can train the method. With several, batch norm would see a part of
    # the batch, and dropout would draw other masks.
    single_process_only: bool = False
    # Whether a training step launches the same CUDA kernels for every batch of a size and waits for
    # none of them, so that it can be a CUDA graph (utils/cuda_graph.py). So it has no branch on a
    # tensor's value, no dropout, and no Python state that changes from step to step.
    has_fixed_kernels: bool = False

    def __init__(self, embed_dim: int = 512):
        super().__init__()
        self.embed_dim = embed_dim

    # What a method defines.

    def encode_image(self, z: Tensor) -> Encoded:
        """Map image embeddings z (N, D) to the parameters of their distributions, (N, ...) each."""
        raise NotImplementedError

    def encode_text(self, z: Tensor) -> Encoded:
        """Map text embeddings z (N, D) to the parameters of their distributions, (N, ...) each."""
        raise NotImplementedError

    def describe_image(self, *encoded: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean (N, D) and uncertainty (N,) of what `encode_image` returned.

        The uncertainty is None if images have none.
        """
        return encoded[0], None

    def describe_text(self, *encoded: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean (N, D) and uncertainty (N,) of what `encode_text` returned.

        The uncertainty is None if texts have none.
        """
        raise NotImplementedError

    def loss(self, *encoded: Tensor) -> Loss:
        """The training loss of what `encode` returned for B true pairs.

        Returns: the loss, (), or a dict of its named terms, () each, whose sum is the loss.
        """
        raise NotImplementedError

    def score(self, image: Encoded, text: Encoded) -> Tensor:
        """How well N images match M texts, from what the encoders returned.

        Returns: (N, M), float32 or float64; a larger score is a better match.
        """
        return cosine_similarity(image[0], text[0])

    def own_score(self, image: Encoded, text: Encoded) -> Tensor:
        """As `score`, but the score that the method's own authors rank by, variances included."""
        return self.score(image, text)

    def variance_of(self, *encoded: Tensor) -> Tensor | None:
        """The variances (N, D) of the Gaussians that an encoder returned; None if it makes none."""
        return None

    def start_at(self, variance: float | None) -> None:
        """Give every distribution this initial variance, summed over the dimensions.

        None leaves the layers as they are.
        """
        if variance is not None:
            raise NotImplementedError(f"{type(self).__name__} has no start_variance")

    # What all methods share.

    def encode(self, z_image: Tensor, z_text: Tensor) -> Encoded:
        """Map B pairs of embeddings, (B, D) each, to the arguments of `loss`, (B, ...) each."""
        image = self.encode_image(at_least_float32(z_image))
        text = self.encode_text(at_least_float32(z_text))
        return (*image, *text)

    def forward(self, z_image: Tensor, z_text: Tensor) -> Tensor:
        """The training loss, (), of B true pairs of embeddings, (B, D) each."""
        encoded = self.encode(z_image, z_text)
        return total_loss(self.loss(*encoded))

    def adapt_image(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map image embeddings (N, D) to mean (N, D) and uncertainty, (N,) or None."""
        encoded = self.encode_image(at_least_float32(z))
        return self.describe_image(*encoded)

    def adapt_text(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map text embeddings (N, D) to mean (N, D) and uncertainty, (N,) or None.

        The larger the uncertainty, the less certain the text.
        """
        encoded = self.encode_text(at_least_float32(z))
        return self.describe_text(*encoded)

    def similarity(self, z_image: Tensor, z_text: Tensor) -> Tensor:
        """Retrieval scores of all pairs: z_image (N, D) and z_text (M, D) -> (N, M).

        A larger score is a better match.
        """
        image = self.encode_image(at_least_float32(z_image))
        text = self.encode_text(at_least_float32(z_text))
        return self.score(image, text)


class GaussianAdaptor(Adaptor):
    """What PCME++ and ProLIP share: every embedding becomes a diagonal Gaussian.

    mean = unit(z), log_var = MLP(unit(z)), (N, D) each; uncertainty = mean_d exp(log_var).
    A subclass defines `recipes` and `loss`.
    """

    ranks_by_frozen_cosine = True
    has_fixed_kernels = True
    trunk = staticmethod(mlp)  # embed_dim -> Sequential, (N, D) -> (N, D), ends in a linear layer

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
        if variance is not None:
            self.set_last_bias(math.log(variance / self.embed_dim))

    def set_last_bias(self, value):
        """Set the last bias of both heads, to which log_var is close before training."""
        for head in (self.image_head, self.text_head):
            nn.init.constant_(head["log_var"][-1].bias, value)

    def variance_of(self, mean, log_var):
        return at_least_float32(log_var).exp()

    def describe_text(self, mean, log_var):
        return mean, total_variance(log_var) / self.embed_dim

    describe_image = describe_text
