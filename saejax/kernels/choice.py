"""Choice of a kernel's form by operation, device and shape; the user can override it.

A kernel calls `of` while JAX traces it, and names the form that its own measured rule prefers. `of` returns that form
unless the user named another, in the environment variable SAEJAX_KERNELS or through `use` (a config field). The syntax
is one form for all operations ("sparse") or one per operation ("encode=pallas,accumulate=dense"). The empty string
keeps the rule.

The Pallas kernels run on NVIDIA GPUs. The encoder needs compute capability 9.0 exactly, because it uses Hopper's
products; the others need 9.0 or above. There the rule takes them: they read every row of the dictionary once, where XLA
writes gathered rows and reads them back, and they add gradients in a fixed order, where XLA uses atomics. These reasons
are counts of bytes and compiled programs; no GPU has timed them yet. The rule never takes the encoder's kernel.
"""

import contextlib
import contextvars
import enum
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax

from saejax.errors import UserError
from saejax.kernels import mosaic, pallas_decode, pallas_encode

VARIABLE = "SAEJAX_KERNELS"
"""The environment variable."""
_said = contextvars.ContextVar[str | None]("kernels", default=None)
_target = contextvars.ContextVar[Any]("target", default=None)


class Form(enum.Enum):
    """Form of an operation: its algorithm."""

    dense = "dense"
    """Dense products over all latents."""
    sparse = "sparse"
    """XLA over active latents only; for `encode`, the product and then top-k."""
    screened = "screened"
    """Of `encode` in float32 on a CPU: a bfloat16 product names candidates, which are computed exactly."""
    pallas = "pallas"
    """A Pallas kernel for NVIDIA GPUs; unmeasured."""


class Operation(enum.Enum):
    """Operation with several forms."""

    encode = "encode"
    """The encoder's product and its k largest entries."""
    decode = "decode"
    """Sums of weighted rows."""
    dot = "dot"
    """Products of a row with other rows: the gradient of the values."""
    accumulate = "accumulate"
    """Rows added to where indices say: the gradients of the weights."""


def of(
    operation: Operation,
    preferred: Form,
    *,
    width: int,
    rows: int = 1,
    n: int = 1,
    k: int = 1,
    dtype: str = "float32",
) -> Form:
    """Returns the form to trace.

    The user's form gives way to `preferred` where it does not exist: sizes that no kernel takes, a dense `encode`.

    Args:
      operation: What is computed.
      preferred: Choice of the caller's rule for this backend and these sizes.
      width: Entries of a row of `x`, `y` or the dictionary.
      rows, n, k: Rows of the batch, latents, and how many are kept, on one device; only `encode` looks at them.
      dtype: Operands of the product.

    Raises:
      UserError: Where the text is malformed, or names pallas on a device that cannot run it.

    Examples:
      >>> with use("accumulate=dense"):
      ...     of(Operation.accumulate, Form.sparse, width=4).name
      'dense'
    """
    text = said()
    form = parse(text).get(operation, preferred)
    if form is Form.pallas:
        check_device(operation, text)
        if operation is Operation.encode:
            fits = pallas_encode.fits(rows, width, n, dtype)
        else:
            fits = dtype == "float32" and pallas_decode.fits(width)
        return Form.pallas if fits else preferred
    if operation is not Operation.encode:
        return preferred if form is Form.screened else form
    fits = form is Form.sparse or form is Form.screened and dtype == "float32" and 2 * k < n
    return form if fits else preferred


def on_gpu(operation: Operation, kernel: Callable, xla: Callable, **sizes: Any) -> Callable:
    """Returns the kernel where the user chose pallas and it takes these sizes (those of `of`), else the XLA form."""
    return kernel if of(operation, Form.sparse, **sizes) is Form.pallas else xla


@contextlib.contextmanager
def compiling_for(device: Any) -> Iterator[None]:
    """Within it, functions are traced for this device, which need not be here (`parallel.targets`)."""
    before = _target.set(device)
    try:
        yield
    finally:
        _target.reset(before)


def target() -> Any:
    """Returns the device that functions are traced for: that of `compiling_for`, else the first one here."""
    device = _target.get()
    return jax.devices()[0] if device is None else device


def runs_mosaic() -> bool:
    """Returns whether the traced-for device runs Pallas kernels: an NVIDIA GPU of compute capability 9.0 or above."""
    device = target()
    if device.platform != "gpu" or not mosaic.available():
        return False
    return int(str(getattr(device, "compute_capability", "0")).partition(".")[0]) >= 9


def said() -> str:
    """Returns the user's setting: inside `use` its argument, else the environment variable."""
    text = _said.get()
    return os.environ.get(VARIABLE, "") if text is None else text


@contextlib.contextmanager
def use(text: str) -> Iterator[None]:
    """Inside, functions are traced with these forms; earlier traces stay unchanged."""
    parse(text)
    before = _said.set(text)
    try:
        yield
    finally:
        _said.reset(before)


def parse(text: str) -> dict[Operation, Form]:
    """Returns the forms that a text names.

    Raises:
      UserError: In one line.

    Examples:
      >>> {k.name: v.name for k, v in parse("encode=pallas, dot=sparse").items()}
      {'encode': 'pallas', 'dot': 'sparse'}
    """
    forms = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, form = part.rpartition("=")
        if form not in Form.__members__ or (name or "encode") not in Operation.__members__:
            raise UserError(
                f"kernels ({VARIABLE}) must be one of {', '.join(Form.__members__)}, or one for each of "
                f"{', '.join(Operation.__members__)} as in encode=pallas,dot=sparse, got {text}"
            )
        forms.update({operation: Form[form] for operation in Operation if name in ("", operation.name)})
    return forms


def check_device(operation: Operation, text: str) -> None:
    """Raises the user's one-line error where the first device cannot run this operation's Pallas kernel."""
    device = target()
    capability = getattr(device, "compute_capability", "") if device.platform == "gpu" else ""
    major = int(capability.partition(".")[0]) if capability[:1].isdigit() else 0
    hopper = operation is Operation.encode
    if not (capability == "9.0" if hopper else major >= 9) or not mosaic.available():
        raise UserError(
            f"kernels ({VARIABLE}) names pallas for {operation.name}, which needs jax with Pallas and an NVIDIA GPU of "
            f"compute capability 9.0{'' if hopper else ' or above'}, got {text} on {device.device_kind}"
        )
