"""PyTorch models as a source of activations: any `transformers` decoder, BERT-like encoder or vision model.

It complements the JAX models of `language_model`: it accepts any architecture, hooks are module paths of the torch
model, and `capture` returns what the JAX models return. `saejax harvest model=torch:...` reads text with it,
`write_images` reads images. It needs the extra `torch`, which is imported only when a model is loaded. It is slower
than the JAX models and uses one device.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from saejax.activations.language_model import FileTokenizer, bos, hf
from saejax.errors import UserError
from saejax.fields import paths
from saejax.storage import atomic, json_yaml, lock

INSTALL = "pip install 'saejax[torch]'"


class TorchModel:
    """A torch model on one device, read by forward hooks that stop the run once all hooks have fired.

    Hooks are module paths as `model.named_modules()` lists them: `layers.3`, `encoder.layer.3`, `h.3.mlp`.
    The value is the module's output, or its first entry where that is a tuple. Made by `load`.
    """

    def __init__(self, model: Any, *, tokenizer: FileTokenizer | None, provenance: dict[str, Any]) -> None:
        self.model, self.file_tokenizer, self.provenance = model, tokenizer, provenance
        self.tokenizer = tokenizer and tokenizer.tokenizer
        self._modules = dict(model.named_modules())
        self._widths: dict[str, int] = {}

    @property
    def config(self) -> Any:
        """The model's `transformers` configuration."""
        return self.model.config

    def hook_width(self, hook: str) -> int:
        """Coordinates of the activation at a hook, from one run on a token or a blank image."""
        if hook not in self._widths:
            if hasattr(self.config, "image_size"):
                sides = np.broadcast_to(self.config.image_size, 2)
                blank = np.zeros((1, getattr(self.config, "num_channels", 3), *sides), np.float32)
                self._widths[hook] = self.capture_images(blank, (hook,))[hook].shape[-1]
            else:
                one = np.ones((1, 1), np.int32)
                self._widths[hook] = self.capture(one, one, (hook,))[hook].shape[-1]
        return self._widths[hook]

    def capture(
        self, tokens: Int[np.ndarray, "b s"], segments: Int[np.ndarray, "b s"], hooks: tuple[str, ...]
    ) -> dict[str, Float[np.ndarray, "b s _"]]:
        """Activations of text at some hooks; every segment runs as a sequence of its own, exact for any
        attention.

        Args:
          tokens: int [b, s].
          segments: int [b, s]; 0 is padding, equal numbers side by side are one document.
          hooks: module paths.

        Returns:
          Hook -> float32 [b, s, width]; zeros at padding.

        Raises:
          UserError: an unknown module path, or a module whose output is not [b, s, width].
        """
        tokens, segments = np.asarray(tokens), np.asarray(segments)
        runs = list(_runs(segments))
        if not runs:
            return {hook: np.zeros((*tokens.shape, self.hook_width(hook)), np.float32) for hook in hooks}
        longest = max(stop - start for _, start, stop in runs)
        alone, mask = np.zeros((2, len(runs), longest), np.int64)
        for i, (row, start, stop) in enumerate(runs):
            alone[i, : stop - start], mask[i, : stop - start] = tokens[row, start:stop], 1
        found = self._run(hooks, input_ids=alone, attention_mask=mask)
        out = {}
        for hook, value in found.items():
            if value.ndim != 3 or value.shape[:2] != alone.shape:
                raise UserError(f"hook={hook!r} gives {value.shape} for tokens {alone.shape}, allowed: [b, s, width]")
            out[hook] = np.zeros((*tokens.shape, value.shape[-1]), np.float32)
            for i, (row, start, stop) in enumerate(runs):
                out[hook][row, start:stop] = value[i, : stop - start]
        return out

    def capture_images(
        self, pixels: Float[np.ndarray, "b channels height width"], hooks: tuple[str, ...]
    ) -> dict[str, Float[np.ndarray, "b patches _"]]:
        """Activations of images at some hooks.

        Args:
          pixels: float [b, channels, height, width], prepared as the model's processor does.
          hooks: module paths.

        Returns:
          Hook -> float32 [b, patches, width]; channels first, [b, width, h, w], become h * w patches.

        Raises:
          UserError: an unknown module path, or an output with neither of these shapes.
        """
        found = self._run(hooks, pixel_values=np.asarray(pixels, np.float32))
        for hook, value in found.items():
            if value.ndim == 4:
                found[hook] = np.moveaxis(value.reshape(*value.shape[:2], -1), 1, 2)
            elif value.ndim != 3:
                raise UserError(f"hook={hook!r} gives shape {value.shape}, allowed: [b, patches, width]")
        return found

    def _run(self, hooks: tuple[str, ...], **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run the model until every hook has fired, and return what they saw."""
        import torch

        seen: dict[str, np.ndarray] = {}
        for hook in hooks:
            if hook not in self._modules or not hook:
                near = [name for name in self._modules if name.count(".") <= 2 and name][:8]
                raise UserError(f"hook={hook!r} is not a module of the model, allowed for example: {', '.join(near)}")

        def watch(name: str) -> Any:
            def keep(_module: Any, _inputs: Any, output: Any) -> None:
                value = output[0] if isinstance(output, tuple) else output
                seen[name] = value.detach().float().cpu().numpy().copy()
                if len(seen) == len(set(hooks)):
                    raise _Reached

            return keep

        handles = [self._modules[hook].register_forward_hook(watch(hook)) for hook in dict.fromkeys(hooks)]
        first = next(self.model.parameters())
        given = {name: torch.as_tensor(value, device=first.device) for name, value in inputs.items()}
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].to(first.dtype)
        try:
            with torch.no_grad():
                self.model(**given)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        unseen = [hook for hook in hooks if hook not in seen]
        if unseen:
            raise UserError(f"hook={unseen[0]!r} never runs in the model's forward pass; choose another module")
        return {hook: seen[hook] for hook in hooks}


def load(path_or_name: str | pathlib.Path, *, device: str = "cpu", dtype: str = "float32") -> TorchModel:
    """A torch model with its tokenizer, from disk or a hub.

    Args:
      path_or_name: what `transformers.AutoModel.from_pretrained` takes.
      device: torch device.
      dtype: float32, bfloat16 or float16, of the weights.

    Returns:
      The model, in evaluation mode, without a head.

    Raises:
      UserError: the extra is not installed, or transformers cannot load the model.
    """
    name = paths.checked(path_or_name, "model")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"{error.name} is missing, needed for torch models; install it with: {INSTALL}") from None
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype={dtype!r} is not supported, allowed: float32, bfloat16, float16")
    name = str(path_or_name)
    if pathlib.Path(name).is_dir():
        hf.check_files(pathlib.Path(name))
    try:
        model = transformers.AutoModel.from_pretrained(name, dtype=getattr(torch, dtype)).to(device).eval()
    except Exception as error:  # transformers raises whatever the library of a file raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model={name!r} cannot be loaded by transformers: {json_yaml.one_line(reason)}") from None
    provenance = {"name": name, "family": model.config.model_type, "dtype": dtype, "backend": "torch"}
    return TorchModel(model, tokenizer=_tokenizer(name), provenance=provenance)


def write_images(
    model: TorchModel,
    batches: Iterable[Float[np.ndarray, "b channels height width"]],
    hook: str,
    path: str | pathlib.Path,
) -> int:
    """Harvests a vision model: one row per patch, as arrays that `source=arrays source.path=PATH` trains on.

    Args:
      model: from `load`.
      batches: pixels as `capture_images` takes them, in batches of any size. Training holds out the last rows,
        so images should come in random order.
      hook: module path. Class and register tokens that it carries become rows like the patches.
      path: directory to write, without arrays in it: batch 3 becomes images-00000003.npy, float32
        [images * patches, d_in], image by image.

    Returns:
      The number of rows.

    Raises:
      UserError: the directory holds arrays already, an activation is not finite, or `capture_images` refuses.

    Examples:
      >>> model = load("google/vit-base-patch16-224")  # doctest: +SKIP
      >>> write_images(model, batches, "layers.9", "vit_rows")  # doctest: +SKIP
      605184
    """
    folder = paths.local(path, "path")
    with lock.hold(folder, "write_images"):
        return _write_images(model, batches, hook, folder)


def _write_images(model: TorchModel, batches: Iterable[Any], hook: str, folder: pathlib.Path) -> int:
    rows = 0
    if next(folder.glob("*.npy"), None) is not None:
        raise UserError(f"path {folder} holds arrays already: take another directory, or empty it")
    for number, pixels in enumerate(batches):
        values = model.capture_images(pixels, (hook,))[hook]
        if not np.isfinite(values).all():
            raise UserError(f"activations at {hook} are not finite in batch {number}: the model overflowed")
        with atomic.opened(folder / f"images-{number:08d}.npy") as file:  # what a killed harvest leaves can be read
            np.save(file, values.reshape(-1, values.shape[-1]))
        rows += values.shape[0] * values.shape[1]
    return rows


def _tokenizer(name: str) -> FileTokenizer | None:
    """The fast tokenizer behind the transformers one, as JAX models have it; None for models without text."""
    import transformers
    from transformers.models.auto import tokenization_auto

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name).backend_tokenizer
    except (OSError, ValueError, KeyError, AttributeError, ImportError):
        return None
    config, _ = transformers.PretrainedConfig.get_config_dict(name)
    beside = tokenization_auto.get_tokenizer_config(name)
    return FileTokenizer.of(tokenizer, functools.partial(bos.of_files, config=config, tokenizer_config=beside))


def _runs(segments: Int[np.ndarray, "b s"]) -> Iterator[tuple[int, int, int]]:
    """(row, start, stop) of every document in a packed batch."""
    for row, line in enumerate(segments):
        bounds = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), len(line)]
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            if stop > start and line[start]:
                yield row, start, stop


class _Reached(Exception):
    """All hooks have fired; the rest of the forward pass is not needed."""
