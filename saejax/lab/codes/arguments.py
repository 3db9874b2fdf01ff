"""Argument checks of the codes package: one line with the argument, its value and what is allowed."""

from typing import Any

from saejax.errors import UserError
from saejax.fields import numeric


def check_sizes(**sizes: float) -> None:
    """Refuse sizes that are not whole numbers of at least 1, and k > n_atoms.

    Args:
      sizes: by the name that the caller knows, e.g. `n_atoms`, `d`, `k`, `trials`.

    Raises:
      UserError: naming the first bad argument.
    """
    for name, value in sizes.items():
        if not _number(value) or not 1 <= value < float("inf") or int(value) != value:
            raise UserError(f"{name} = {value}: a whole number of at least 1 is needed")
    if "k" in sizes and "n_atoms" in sizes and sizes["k"] > sizes["n_atoms"]:
        raise UserError(f"k = {sizes['k']}: at most n_atoms = {sizes['n_atoms']} atoms can be active")


def check_indexable(**sizes: int) -> None:
    """Refuse sizes that are not whole numbers of at least 1, or that no int32 counts.

    Args:
      sizes: by the name that the caller knows.

    Raises:
      UserError: naming the first bad argument.
    """
    check_sizes(**sizes)
    for name, value in sizes.items():
        if value > numeric.LARGEST:
            raise UserError(f"{name} = {value}: at most {numeric.LARGEST} can be numbered")


def check_seed(**seeds: int) -> None:
    """Refuse seeds that are not whole numbers in [0, 2^32): JAX would take a larger one for another, smaller one.

    Args:
      seeds: by the name that the caller knows.

    Raises:
      UserError: naming the first bad argument.
    """
    for name, value in seeds.items():
        numeric.seed(value, name)


def check_probability(**probabilities: float) -> None:
    """Refuse probabilities outside (0, 1).

    Args:
      probabilities: by the name that the caller knows.

    Raises:
      UserError: naming the first bad argument.
    """
    for name, value in probabilities.items():
        if not _number(value) or not 0 < value < 1:
            raise UserError(f"{name} = {value}: a probability inside (0, 1) is needed")


def check_pairs(n_atoms: int) -> None:
    """Refuse dictionaries without a pair of atoms.

    Args:
      n_atoms: number of rows.

    Raises:
      UserError: fewer than 2.
    """
    check_sizes(n_atoms=n_atoms)
    if n_atoms < 2:
        raise UserError(f"n_atoms = {n_atoms}: interference needs at least 2 atoms")


def check_positive(**values: float) -> None:
    """Refuse numbers that are not finite and above 0.

    Args:
      values: by the name that the caller knows.

    Raises:
      UserError: naming the first bad argument.
    """
    for name, value in values.items():
        if not _number(value) or not 0 < value < float("inf"):
            raise UserError(f"{name} = {value}: a finite number above 0 is needed")


def check_choice(name: str, value: str, allowed: object) -> None:
    """Refuse a name that is not one of the allowed ones.

    Args:
      name: of the argument.
      value: what the caller gave.
      allowed: anything that iterates over the allowed names.

    Raises:
      UserError: listing what is allowed.
    """
    names = sorted(allowed)  # type: ignore[call-overload]
    if value not in names:
        raise UserError(f"{name} = {value!r}: one of {', '.join(names)} is needed")


def _number(value: Any) -> bool:
    """Whether it is a number, and no truth value; NaN is one, and passes no comparison."""
    return hasattr(value, "__float__") and not isinstance(value, bool)
