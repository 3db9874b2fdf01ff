"""Success curves: streaming equals brute force, devices and blocks change nothing, published dimensions come out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from saejax.errors import UserError
from saejax.lab.codes import awgn, capacity, gaussian, subsets, success
from saejax.lab.codes.decoders import Decoder
from saejax.lab.codes.dictionaries import signs


def mesh_of(n: int, name: str = "data") -> Mesh:
    return Mesh(np.array(jax.devices()[:n]), (name,), axis_types=(AxisType.Auto,))


def test_streamed_margins_are_the_scores_of_the_whole_dictionary():
    n_atoms, k, dims, seed = 100, 3, [33, 20, 65], 7
    margins = success.one_step(n_atoms, k, dims, n_dictionaries=2, n_supports=5, seed=seed, block=32)
    assert margins.dims.tolist() == [20, 33, 65]
    for number in range(2):
        key = jax.random.fold_in(jax.random.key(seed), number)
        rows = np.asarray(signs(jax.random.fold_in(key, 0), jnp.arange(n_atoms), 65))
        chosen = np.asarray(subsets.sample(jax.random.fold_in(key, 1), n_atoms, k, 5))
        for place, d in enumerate(margins.dims):
            for trial in range(5):
                scores = rows[:, :d] @ rows[chosen[trial], :d].sum(axis=0) / d
                active = np.isin(np.arange(n_atoms), chosen[trial])
                column = 5 * number + trial
                assert margins.weakest_active[place, column] == pytest.approx(scores[active].min())
                assert margins.strongest_inactive[place, column] == pytest.approx(scores[~active].max())
    # On whole dictionaries, trial by trial: scores are whole numbers over 65, so none equals 1/2.
    whole = success.curve("threshold_half", n_atoms, k, [65], n_dictionaries=2, n_supports=5, seed=seed)
    assert whole.successes[0] == margins.threshold(0.5).successes[-1]
    assert (margins.top_k().successes >= margins.threshold(0.5).successes).all()


def test_devices_and_blocks_change_nothing():
    """13 supports do not divide over the devices; sums of signs are exact, so the margins are equal bit for bit."""
    alone = success.one_step(130, 4, [40, 90], n_dictionaries=1, n_supports=13, block=130)
    split = success.one_step(130, 4, [40, 90], n_dictionaries=1, n_supports=13, block=37, mesh=mesh_of(8))
    np.testing.assert_array_equal(alone.weakest_active, split.weakest_active)
    np.testing.assert_array_equal(alone.strongest_inactive, split.strongest_inactive)


@pytest.mark.parametrize("decoder", ["integer_pursuit", Decoder(method="omp")])
def test_sharded_curves_equal_unsharded_ones(decoder):
    arguments = dict(n_dictionaries=2, n_supports=13, seed=1)
    alone = success.curve(decoder, 256, 4, [20], **arguments)
    split = success.curve(decoder, 256, 4, [20], mesh=mesh_of(4), **arguments)
    assert 0 < alone.successes[0] < alone.trials == 26
    np.testing.assert_array_equal(alone.successes, split.successes)


def test_one_step_decoders_need_the_published_dimensions():
    """N = 2^12, k = 16: top-k d50 442, half threshold d50 826, by an independent run; Gaussian theory 448 and 822."""
    margins = success.one_step(2**12, 16, range(380, 881, 100), n_dictionaries=2, n_supports=100)
    top_k, half = margins.top_k(), margins.threshold(0.5)
    # 200 trials: the standard error of P is 0.035, and P rises by 0.15 per 5 % of d: four of them.
    assert top_k.dims_at(0.5) == pytest.approx(442, rel=0.05)
    assert half.dims_at(0.5) == pytest.approx(826, rel=0.05)
    theory = [gaussian.top_k_success(2**12, 16, d) for d in margins.dims]
    assert np.abs(top_k.probability - theory).max() < 0.12


def test_integer_pursuit_needs_less_than_one_dimension_per_bit_where_published():
    """N = 2^12, k = 4: half of the codes at d = 36, nine in ten at 51, by an independent run of 300 trials."""
    curve = success.curve("integer_pursuit", 2**12, 4, [33, 39, 51], n_dictionaries=3)
    # Standard error 0.03 from 300 trials, and as much again in the reference; d50 lies within 8 % of 36.
    assert curve.probability[0] < 0.5 + 0.09 and curve.probability[1] > 0.5 - 0.09
    assert abs(curve.probability[2] - 0.9) < 0.09


def test_basis_pursuit_turns_at_the_statistical_dimension():
    n_atoms, k = 256, 13
    turn = capacity.statistical_dimension(n_atoms, k)
    decoder = Decoder(method="basis_pursuit", options=(("max_iterations", 600),))
    curve = success.curve(decoder, n_atoms, k, [round(0.75 * turn), round(1.25 * turn)], n_supports=24)
    # Measured 0.04 and 0.96 here; the standard error at 24 trials is below 0.1.
    assert curve.probability[0] < 0.4 and curve.probability[1] > 0.6


def test_isotonic_dims():
    curve = success.Curve(dims=np.array([10, 20, 30, 40]), successes=np.array([0, 6, 4, 10]), trials=10)
    assert curve.dims_at(0.5) == 20.0  # 6 and 4 are pooled to 5
    assert curve.dims_at(0.25) == 15.0
    late = success.Curve(dims=np.array([10, 20]), successes=np.array([6, 8]), trials=10)
    assert np.isnan(late.dims_at(0.5)) and np.isnan(late.dims_at(0.9))


def test_implicit_codes_of_a_million_atoms_fit_in_a_stated_memory():
    """Nothing of size n_atoms appears in the compiled program, and it holds what `one_step_bytes` says."""
    n_atoms, k, d, supports, block = 2**20, 256, 4096, 8, 256
    program = success._one_step_program(n_atoms, k, (d // 2, d), block, None)
    keys = subsets.row_keys(jax.random.key(0), supports)
    compiled = program.lower(jax.random.key(0), keys).compile()
    used = compiled.memory_analysis().temp_size_in_bytes
    stated = success.one_step_bytes(n_atoms, d, n_supports=supports, n_dims=2, block=block)
    assert used <= stated < n_atoms * 32


def test_a_codeword_in_noise():
    """Simulation and the integral over spherical caps are independent of each other."""
    for n_codewords, d in [(2, 5), (300, 12)]:
        flags = np.asarray(awgn.success(jax.random.key(0), n_codewords, d, 1.0, 4000, n_codebooks=40))
        expected = awgn.exact_success(n_codewords, d, 1.0)
        # Trials share codebooks, which at most doubles the standard error of 4,000 coins.
        assert abs(flags.mean() - expected) < 4 * 2 * np.sqrt(expected * (1 - expected) / len(flags))


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: success.one_step(10, 11, [5]), "k = 11"),
        (lambda: success.one_step(10, 10, [5]), "k = 10"),
        (lambda: success.one_step(10, 2, []), "n_dims = 0"),
        (lambda: success.one_step(10, 2, [0]), "dims = 0"),
        (lambda: success.one_step(2**20, 256, [2**16]), "dims = 65536"),
        (lambda: success.one_step(10, 2, [5], n_supports=0), "n_supports = 0"),
        (lambda: success.one_step(10, 2, [5], mesh=mesh_of(2, "rows")), "mesh = "),
        (lambda: success.curve("magic", 10, 2, [5]), "method = 'magic'"),
        (lambda: success.one_step(2**31, 2, [5]), "n_atoms = 2147483648"),
        *(
            (lambda seed=seed: success.one_step(10, 2, [5], seed=seed), "seed must be")
            for seed in (-1, 2**32, math.nan)
        ),
        *((lambda seed=seed: success.curve("map", 10, 2, [5], seed=seed), "seed must be") for seed in (-1, 2**32)),
        (lambda: awgn.success(jax.random.key(0), 4, 4, -1.0, 4), "noise = -1.0"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(UserError, match=named):
        call()
