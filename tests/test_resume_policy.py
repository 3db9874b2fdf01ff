"""Every config field says beside its definition what it allows when a run goes on."""

import dataclasses

import pytest

from saejax import config
from saejax.activations import source
from saejax.fields import resume_policy
from saejax.fields.resume_policy import Fixed, Free, Place, Policy
from saejax.sae import base

PARTS = [f.default_factory for f in dataclasses.fields(config.Config) if f.default_factory is not dataclasses.MISSING]
CLASSES = [config.Config, *PARTS, *base.ARCHITECTURES.values(), *source.SOURCES.values()]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_declares_itself(cls):
    undeclared = [name for name, policy in resume_policy.of_class(cls).items() if policy is None]
    assert not undeclared, f"{cls.__name__} says of {undeclared} neither Fixed, Free nor Place"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    shape: Fixed[int] = 1
    rate: Free[float | None] = None
    silent: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Root:
    name = "root"
    part: Fixed[Part] = dataclasses.field(default_factory=Part)
    where: Place[tuple[str, ...]] = ()


def test_policies_by_flat_key_and_silence_is_fixed():
    assert resume_policy.of(Root()) == {
        "type": Policy.fixed,
        "part.shape": Policy.fixed,
        "part.rate": Policy.free,
        "part.silent": Policy.fixed,
        "where": Policy.place,
    }
    assert resume_policy.of_class(Part)["silent"] is None


def test_policies_and_plain_configs_have_the_same_keys():
    cfg = config.load("train", config.Config, ["sae=jumprelu"])
    assert resume_policy.of(cfg).keys() == config.flat(config.to_plain(cfg)).keys()
