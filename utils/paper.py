"""The paper repository's checkpoints, bare state dicts: their parameters' names in, ours out."""

import torch

from utils.cli import UserError, need

GAUSSIAN = {"img_enc.logvar.": "image_head.log_var.", "txt_enc.logvar.": "text_head.log_var."}
# The methods a file may hold, and the beginnings of its names -> ours.
NAMES = [
    (("asymvlm-psd", "asymvlm-vmf"), {"text_adaptor.etta.": "text_mlp.", "text_adaptor.temperature": "temperature"}),
    (("pfe",), {"image_adaptor.logvar.": "image_mlp.", "text_adaptor.logvar.": "text_mlp."}),
    (("pcmepp",), GAUSSIAN | {"loss_func.shift": "shift", "loss_func.negative_scale": "negative_scale"}),
    (("prolip",), GAUSSIAN),
    (("probvlm",), {"img_BayesCap.": "image_bayescap.", "txt_BayesCap.": "text_bayescap."}),
]


def translate(content, path, method=None):
    """What a bare state dict of the paper's repository is, in our terms.

    Args:
        content: what the file holds.
        path: the file: its name tells the method where its parameters do not.
        method: the method, if known.
    Returns: method, width (None if it cannot be told), weights under our names.
    Raises: UserError if it is no such state dict, or may be of two methods.
    """
    is_state_dict = isinstance(content, dict) and content and all(isinstance(key, str) for key in content)
    need(is_state_dict, f"{path}: not a checkpoint: neither one of ours nor a state dict of the paper's repository")
    for methods, names in NAMES:
        prefix_of = {key: next((theirs for theirs in names if key.startswith(theirs)), None) for key in content}
        if set(prefix_of.values()) != set(names):  # a parameter that these methods do not have, or lacks one
            continue
        named = [name for name in (method, path.stem) if name in methods] or methods
        cure = "name the file <method>.pt or give load_adaptor its method"
        need(named is not methods or len(methods) == 1, f"{path}: may be of {' or of '.join(methods)}; {cure}")
        weights = {names[prefix] + key.removeprefix(prefix): content[key] for key, prefix in prefix_of.items()}
        for key in ("shift", "negative_scale"):  # () here, (1,) there
            if isinstance(weights.get(key), torch.Tensor) and weights[key].numel() == 1:
                weights[key] = weights[key].reshape(())
        bias = next((value for key, value in weights.items() if key.endswith((".6.bias", ".mod.5.bias"))), None)
        return named[0], bias.numel() if isinstance(bias, torch.Tensor) else None, weights
    raise UserError(f"{path}: parameters such as {next(iter(content))!r} belong to no method known here")
