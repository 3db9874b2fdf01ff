"""The experiments on superposition codes: what their checks can tell, on tiny settings; their arguments."""

import dataclasses
import math

import pytest

from saejax.errors import UserError
from saejax.lab.experiments import (
    codes_awgn,
    codes_capacity,
    codes_coherence,
    codes_data,
    codes_decoders,
    codes_fig2,
    codes_optimise,
    codes_prop5,
    codes_proportional,
)
from saejax.lab.experiments.harness import Check, run_experiment


def failed(checks: list[Check]) -> list[str]:
    return [check.quantity for check in checks if not check.passed]


def test_the_calculator_prints_the_whole_table(tmp_path, capsys):
    outcome = run_experiment(codes_capacity.Capacity(), tmp_path)
    assert outcome.passed
    printed = capsys.readouterr().out
    for rule in ("compressed_sensing_c1", "integer_pursuit", "basis_pursuit_signed", "4 k ln(kN)", "8 k ln(N)"):
        assert rule in printed
    assert "2.258e+34" in printed and "1.476e+04" in printed
    judged = codes_capacity.Capacity().quick().run().checks
    assert len(judged) == len(codes_data.FEATURES_OF_BERT) and all(check.verdict == "pass" for check in judged)


def test_the_calculator_takes_other_sizes():
    outcome = codes_capacity.Capacity(d_in=64, k=1, n_atoms=1000).run()
    margins = {row["rule"]: row["margin"] for row in outcome.values["rules"]}
    assert margins["threshold"] == pytest.approx(64 / (8 * math.log(1000)))
    assert all(check.verdict == "-" for check in outcome.checks)


def test_noise_experiment_sees_a_wrong_codebook(monkeypatch):
    experiment = codes_awgn.AWGNCodebook(n_codewords=256, dims=(12,), trials=400)
    outcome = experiment.run()
    assert not failed(outcome.checks) and outcome.figure is not None
    doubled = codes_awgn.awgn.success
    monkeypatch.setattr(
        codes_awgn.awgn, "success", lambda key, n, d, noise, *a, **kw: doubled(key, n, d, 2 * noise, *a, **kw)
    )
    assert failed(experiment.run().checks)


def test_coherence_experiment_passes_at_the_bound_and_not_at_half_of_it():
    outcome = codes_coherence.Coherence(n_atoms=64, epsilons=(0.5,), n_draws=10).run()
    assert not failed(outcome.checks)
    shares = outcome.values["0.5"]["share"]
    assert shares[0] < shares[-1]


def test_optimised_dictionaries_need_their_steps():
    small = codes_optimise.OptimiseDictionary(n_atoms=(64,), dims=(32,), n_supports=50)
    assert not [name for name in failed(small.run().checks) if "interference" in name]
    assert failed(dataclasses.replace(small, steps=1).run().checks)


def test_capacity_curve_and_its_excess():
    outcome = codes_prop5.Prop5Capacity(log2_atoms=(9,), actives=(4,), n_dictionaries=2).run()
    assert not [name for name in failed(outcome.checks) if name.startswith("C(")]
    assert 1 < outcome.values["cells"]["2^9, k=4"]["excess"] < 1.3


def test_dense_codes_turn_at_the_statistical_dimension():
    outcome = codes_proportional.Proportional(
        n_atoms=128, active_shares=(0.1,), shares=(0.7, 1.3), n_supports=16, max_iterations=300
    ).run()  # fmt: skip
    curve = outcome.values["basis_pursuit"]["k=13, nonneg"]
    assert curve["probability"][0] <= curve["probability"][-1] and curve["dims"][-1] < 128
    assert outcome.values["top_k"][13] < 0.1


def test_decoders_and_fig2_on_their_smallest_cell(monkeypatch):
    cell = (6, 2)
    monkeypatch.setitem(codes_data.ONE_STEP, cell, {"top_k": (10, 22), "threshold_half": (30, 60)})
    monkeypatch.setitem(codes_data.ITERATIVE, cell, {"integer_pursuit": (8, 14), "basis_pursuit": (8, 14)})
    few = codes_decoders.Fig4Decoders(log2_atoms=(6,), actives=(2,), n_dictionaries=1, n_pursuit=1, n_convex=8)
    few = dataclasses.replace(few, decoders=("top_k", "threshold_half", "integer_pursuit"))
    outcome = few.run()
    curves = outcome.values["curves"]["2^6, k=2"]
    assert set(curves) == {"top_k", "threshold_half", "integer_pursuit"}
    assert curves["integer_pursuit"]["d50"] < curves["top_k"]["d50"] < curves["threshold_half"]["d50"]
    fig2 = codes_fig2.Fig2(n_atoms=2**12, measured_log2=6, measured_k=(2,), n_dictionaries=1, supports_at_scale=0).run()
    assert not [name for name in failed(fig2.checks) if "2^20" in name]


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: codes_capacity.Capacity(d_in=0), "d_in = 0"),
        (lambda: codes_capacity.Capacity(k=10, n_atoms=10), "n_atoms = 10"),
        (lambda: codes_fig2.Fig2(measured_log2=13), "measured_log2 = 13"),
        (lambda: codes_decoders.Fig4Decoders(decoders=("magic",)), "decoders = 'magic'"),
        (lambda: codes_decoders.Fig4Decoders(actives=(5,)), "actives = 5"),
        (lambda: codes_prop5.Prop5Capacity(below=2.0), "below = 2.0"),
        (lambda: codes_proportional.Proportional(active_shares=(0.6,)), "active_shares"),
        (lambda: codes_coherence.Coherence(p=0.0), "p = 0.0"),
        (lambda: codes_awgn.AWGNCodebook(noise=0.0), "noise = 0.0"),
        (lambda: codes_optimise.OptimiseDictionary(dims=(3,)), "dims = "),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(UserError, match=named):
        call()
