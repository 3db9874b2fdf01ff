"""Goodfire autoencoders of Llama 3: one `.pt` or `.pth` file, a ReLU between two linear layers.

Sources:
  SAELens 6.54, `get_goodfire_huggingface_loader`, and its test against the class of the model card.
"""

import os
import pathlib

from saejax.fields import paths
from saejax.interop import strict, torch_file
from saejax.sae.model import SAE

name = "goodfire"
export = None

_SIGNATURE = {"encoder_linear.weight", "decoder_linear.weight"}


def detect(path: pathlib.Path) -> bool:
    """Returns whether `path` is a file of torch.save with the keys of one."""
    return path.is_file() and torch_file.keys(path) >= _SIGNATURE


def load(path: str | os.PathLike) -> SAE:
    """Reads one file.

    Raises:
      UserError: the file would run code; a key is missing or unknown; a wrong shape; a NaN.
    """
    path = paths.local(path, "path")
    state = torch_file.read_state_dict(path)
    d, n = strict.sizes(path, state, "encoder_linear.weight", transposed=True)
    shapes = {
        "encoder_linear.weight": (n, d),
        "encoder_linear.bias": (n,),
        "decoder_linear.weight": (d, n),
        "decoder_linear.bias": (d,),
    }
    w = strict.arrays(path, state, shapes)
    encoder, decoder = w["encoder_linear.weight"].T, w["decoder_linear.weight"].T
    params = strict.params(encoder, w["encoder_linear.bias"], decoder, w["decoder_linear.bias"])
    return SAE(strict.build(path, "l1", params, subtract_b_dec=False), params, {"path": str(path)})
