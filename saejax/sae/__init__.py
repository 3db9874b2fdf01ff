"""Sparse autoencoders: one file per architecture, `base` for their shared part, `model` for users."""

from saejax.sae.abs_topk import AbsTopK as AbsTopK
from saejax.sae.base import ARCHITECTURES as ARCHITECTURES
from saejax.sae.base import Aux as Aux
from saejax.sae.base import Encoding as Encoding
from saejax.sae.base import MatmulDtype as MatmulDtype
from saejax.sae.base import SAEParams as SAEParams
from saejax.sae.base import Sparsifier as Sparsifier
from saejax.sae.batch_topk import BatchTopK as BatchTopK
from saejax.sae.gated import Gated as Gated
from saejax.sae.jumprelu import JumpReLU as JumpReLU
from saejax.sae.jumprelu import SparsityPenalty as SparsityPenalty
from saejax.sae.l1 import L1 as L1
from saejax.sae.l1 import Penalty as Penalty
from saejax.sae.layout import EncoderInit as EncoderInit
from saejax.sae.layout import EncoderKind as EncoderKind
from saejax.sae.layout import Family as Family
from saejax.sae.matching_pursuit import MatchingPursuit as MatchingPursuit
from saejax.sae.matryoshka import Matryoshka as Matryoshka
from saejax.sae.matryoshka import Selection as Selection
from saejax.sae.model import SAE as SAE
from saejax.sae.p_anneal import PAnneal as PAnneal
from saejax.sae.topk import TopK as TopK
