"""SAEBench wrapper: an SAE as a PyTorch module with the same numbers, unit decoder rows and config fields.

SAEBench's `BaseSAE` and `CustomSAEConfig` define what it reads; nothing of it is imported here. The weights equal
those of `saelens.converted`, so both exports agree. It needs the extra `torch`.

Source:
  Karvonen et al. 2025, SAEBench, arXiv 2503.09532; `sae_bench/custom_saes/base_sae.py` of version 0.6.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import types
from typing import TYPE_CHECKING, Any

from saejax.errors import UserError
from saejax.interop import saelens
from saejax.sae.model import SAE

HAS_TORCH = importlib.util.find_spec("torch") is not None
if TYPE_CHECKING or HAS_TORCH:
    import torch
    from torch import Tensor, nn
else:  # this module can still be imported; `adapter` says what is missing
    nn = types.SimpleNamespace(Module=object)


@dataclasses.dataclass(kw_only=True)
class Config:
    """Fields that SAEBench reads from `sae.cfg`; not frozen, because it sets some itself."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int = 128
    hook_head_index: int | None = None
    architecture: str = ""
    apply_b_dec_to_input: bool = False
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = "cpu"
    model_from_pretrained_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    @property
    def architecture_str(self) -> str:
        """The architecture under the name that the core evaluation asks for."""
        return self.architecture

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, JSON-able."""
        return dataclasses.asdict(self)


def adapter(
    sae: SAE,
    *,
    model_name: str | None = None,
    hook_name: str | None = None,
    context_size: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Returns an SAE as SAEBench wants it.

    Args:
      sae: Of any architecture that the saelens format takes.
      model_name: TransformerLens' name of the model, such as pythia-160m-deduped; None takes the SAE's own record.
      hook_name: TransformerLens' name of the hook, blocks.<layer>.<...>; None takes the SAE's own record.
      context_size: Tokens per sequence; None takes the SAE's own record, and 128 where there is none.
      device: Where the weights go.
      dtype: Of the weights; None is float32.

    Raises:
      UserError: PyTorch is missing, the architecture cannot be written, a decoder row is 0, model or hook is unknown.

    Examples:
      selected_saes = [("my_release", adapter(saejax.load("runs/X"), model_name="gpt2"))]
    """
    if not HAS_TORCH:
        raise UserError("torch is missing, needed for SAEBench; install it with: pip install 'saejax[torch]'")
    if not sae.sparsifier.mirrors:
        raise UserError(f"sae.family={sae.sparsifier.family.name}: saebench evaluates what reconstructs its input")
    config, weights = saelens.converted(sae)
    known = config["metadata"]
    model_name, hook_name = model_name or known.get("model_name"), hook_name or known.get("hook_name")
    if not model_name:
        raise UserError("saebench: this SAE does not know its model; give model_name=, as TransformerLens calls it")
    layer = re.match(r"blocks\.(\d+)\.", hook_name or "")
    if layer is None:
        raise UserError(f"saebench: hook_name must be blocks.<layer>.<...>, got {hook_name}; give hook_name=")
    cfg = Config(
        model_name=str(model_name),
        d_in=config["d_in"],
        d_sae=config["d_sae"],
        hook_layer=int(layer[1]),
        hook_name=str(hook_name),
        context_size=int(context_size or known.get("context_size") or 128),
        architecture=config["architecture"],
        apply_b_dec_to_input=config["apply_b_dec_to_input"],
    )
    return Adapter(cfg, config, {name: torch.from_numpy(array) for name, array in weights.items()}).to(
        device, dtype or torch.float32
    )


class Adapter(nn.Module):
    """An SAE in PyTorch: saejax's reconstructions; its latents are saejax's times the norms of the decoder rows.

    Args:
      cfg: What SAEBench reads.
      config: As `saelens.converted` returns it.
      weights: Its weights, as tensors.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: Tensor
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor
    norms: Tensor

    def __init__(self, cfg: Config, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        super().__init__()
        norms = weights["W_dec"].norm(dim=1)
        if not norms.all():
            raise UserError(f"saebench: {int((norms == 0).sum())} decoder rows are zero, which no scale makes 1")
        self.cfg, self.k = cfg, int(config.get("k", config.get("max_iterations", 0)))
        weights = {"W_enc": weights["W_dec"].T, **weights, "W_dec": weights["W_dec"] / norms[:, None]}
        weights.setdefault("b_enc", torch.zeros(cfg.d_sae))
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            setattr(self, name, nn.Parameter(weights[name].clone(), requires_grad=False))
        for name in ("threshold", "b_gate", "b_mag", "r_mag"):
            self.register_buffer(name, weights.get(name))
        self.register_buffer("norms", norms)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.W_dec.dtype

    def to(self, *args: Any, **kwargs: Any) -> Adapter:
        """Moves and casts as `nn.Module.to` does; `cfg` follows."""
        super().to(*args, **kwargs)
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        return self

    def encode(self, x: Tensor) -> Tensor:
        """Returns the latents [..., d_sae] of activations [..., d_in]."""
        kind = self.cfg.architecture
        x = x - self.b_dec if self.cfg.apply_b_dec_to_input else x
        if kind == "matching_pursuit":
            return self._pursue(x)
        pre = x @ self.W_enc
        if kind == "gated":
            magnitude = torch.relu(pre * self.r_mag.exp() + self.b_mag)
            return magnitude * (pre + self.b_gate > 0)
        pre = pre + self.b_enc
        if kind == "topk":
            return self._largest(torch.relu(pre), pre)
        if kind == "abstopk":
            return self._largest(pre, pre.abs())
        acts = torch.relu(pre)
        return acts * (pre > self.threshold) if kind == "jumprelu" else acts

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the reconstruction [..., d_in] of latents [..., d_sae]."""
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Returns the reconstruction of activations [..., d_in]."""
        return self.decode(self.encode(x))

    def check_decoder_norms(self) -> bool:
        """Returns whether decoder rows have norm 1, as exactly as SAEBench asks for in this type."""
        tolerance = 1e-5 if self.dtype in (torch.float32, torch.float64) else 1e-2
        return bool((self.W_dec.norm(dim=1) - 1).abs().max() <= tolerance)

    def _largest(self, acts: Tensor, size: Tensor) -> Tensor:
        """The `k` latents of each row that are largest by `size`, in units of decoder rows of norm 1."""
        chosen = size.topk(self.k, dim=-1).indices
        return torch.zeros_like(acts).scatter(-1, chosen, acts.gather(-1, chosen)) * self.norms

    def _pursue(self, residual: Tensor) -> Tensor:
        """Greedy steps: the largest product with a decoder row, taken off the residual."""
        latents = residual.new_zeros(*residual.shape[:-1], self.cfg.d_sae)
        for _ in range(self.k):
            value, best = (residual @ self.W_dec.T).max(dim=-1, keepdim=True)
            value = torch.relu(value)
            latents = latents.scatter_add(-1, best, value)
            residual = residual - value * self.W_dec[best.squeeze(-1)]
        return latents
