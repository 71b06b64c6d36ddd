"""Every adaptor's training loss and its gradients equal the textbook's, whole step by whole step."""

import pytest
import torch

from models import METHODS
from tests.textbook import LOSSES, parameters


@pytest.mark.parametrize("method", LOSSES)
def test_loss_and_gradients_equal_the_textbooks(method):
    torch.manual_seed(0)
    adaptor = METHODS[method](128).double()
    z_image, z_text = 3 * torch.randn(2, 24, 128, dtype=torch.float64)
    weights = parameters(adaptor)
    ours, textbook = adaptor(z_image, z_text), LOSSES[method](weights, z_image, z_text)
    ours.backward()
    textbook.backward()
    tolerance = (
        1e-3 if method == "asymvlm-vmf" else 1e-9
    )  # the textbook's Bessel function is an approximation
    assert ours.item() == pytest.approx(textbook.item(), rel=tolerance)
    for name, parameter in adaptor.named_parameters():
        scale = weights[name].grad.abs().max()
        assert (parameter.grad - weights[name].grad).abs().max() <= 10 * tolerance * scale, name
