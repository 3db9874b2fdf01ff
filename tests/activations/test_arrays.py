"""Arrays on disk: every file format gives the same rows, and what cannot be trained on is refused by name."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from saejax import config
from saejax.activations.arrays import Arrays
from saejax.errors import UserError

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((103, 6)).astype(np.float32)
DTYPES = [np.float16, np.float32, ml_dtypes.bfloat16]


def all_rows(source: Arrays) -> np.ndarray:
    """Training rows of one epoch, sorted back into file order, and the held-out rows behind them."""
    stream = source.open(n_lanes=1, block_rows=1, lanes=range(1), seed=0, prefetch=0)
    rows = np.concatenate([next(stream)[0] for _ in range(stream.n_rows)])
    place = {row.tobytes(): i for i, row in enumerate(ROWS.astype(rows.dtype))}
    order = np.argsort([place[row.tobytes()] for row in rows])
    return np.concatenate([rows[order], *source.heldout(7)])


def save(path, rows, layout: str) -> Arrays:
    """Write rows in one of the layouts that Arrays reads."""
    if layout == "npy":
        np.save(path / "rows.npy", rows)
        return Arrays(path=str(path / "rows.npy"))
    if layout == "directory":
        for number, part in enumerate(np.split(rows, [1, 40, 99])):
            np.save(path / f"part-{number}.npy", part)
        return Arrays(path=str(path))
    save_file({"other": np.zeros((2, 3), np.float32), "acts": rows}, path / "rows.safetensors")
    return Arrays(path=str(path / "rows.safetensors"), tensor="acts")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["npy", "directory", "safetensors"])
def test_every_layout_gives_every_row_once(tmp_path, layout, dtype):
    rows = ROWS.astype(dtype)
    source = save(tmp_path, rows, layout)
    assert source.d_in == 6
    read = all_rows(source)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, rows)


@pytest.mark.parametrize("dtype", [np.float64, np.int16])
def test_other_numbers_become_float32(tmp_path, dtype):
    rows = (ROWS * 100).astype(dtype)
    np.save(tmp_path / "rows.npy", rows)
    read = np.concatenate(list(Arrays(path=str(tmp_path / "rows.npy"), heldout_share=0.5).heldout(10)))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, rows[-len(read) :].astype(np.float32))


def test_blocks_cross_file_borders(tmp_path):
    source = save(tmp_path, ROWS, "directory")
    stream = source.open(n_lanes=1, block_rows=49, lanes=range(1), seed=0)
    blocks = sorted((next(stream)[0] for _ in range(2)), key=lambda block: block[0, 0] != ROWS[0, 0])
    np.testing.assert_array_equal(np.concatenate(blocks), ROWS[:98])


@pytest.mark.parametrize("share, n_heldout", [(0.05, 5), (0.5, 52), (0.005, 1)])
def test_the_last_rows_are_held_out_and_never_trained_on(tmp_path, share, n_heldout):
    np.save(tmp_path / "rows.npy", ROWS)
    source = Arrays(path=str(tmp_path / "rows.npy"), heldout_share=share)
    batches = list(source.heldout(4))
    assert max(len(batch) for batch in batches) <= 4
    np.testing.assert_array_equal(np.concatenate(batches), ROWS[-n_heldout:])
    stream = source.open(n_lanes=1, block_rows=1, lanes=range(1), seed=0)
    assert stream.n_rows == source.n_train() == 103 - n_heldout
    assert sum(len(batch) for batch in source.heldout(4, max_rows=1)) == 1


@pytest.mark.parametrize("dtype", [*DTYPES, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_refused_by_number(tmp_path, dtype, bad):
    rows = ROWS.astype(dtype)
    rows[101, 2] = bad
    np.save(tmp_path / "rows.npy", rows)
    source = Arrays(path=str(tmp_path / "rows.npy"))
    with pytest.raises(UserError, match=r"rows\.npy: row 101 holds NaN or an infinity"):
        list(source.heldout(50))


def test_the_largest_numbers_are_finite(tmp_path):
    for dtype in DTYPES:
        rows = np.full((40, 6), ml_dtypes.finfo(dtype).max, dtype)
        np.save(tmp_path / f"{np.dtype(dtype).name}.npy", rows)
        assert next(Arrays(path=str(tmp_path / f"{np.dtype(dtype).name}.npy")).heldout(2)).shape == (2, 6)


def test_a_float64_beyond_float32_is_refused(tmp_path):
    np.save(tmp_path / "rows.npy", np.full((40, 2), 1e300))
    with pytest.raises(
        UserError, match=r"row 38 holds 1e\+300, and float32 ends at 3.40282e\+38; scale the array down"
    ):
        next(Arrays(path=str(tmp_path / "rows.npy")).heldout(2))


def test_the_parts_of_a_row_add_up_to_it(tmp_path):
    np.save(tmp_path / "rows.npy", ROWS)
    path = str(tmp_path / "rows.npy")
    whole, parts = Arrays(path=path), Arrays(path=path, sites=(2, 4))
    assert (whole.site_widths, parts.site_widths, parts.d_in) == ((6,), (2, 4), 6)
    assert Arrays(path=path, sites=whole.site_widths) == whole != parts and hash(parts) != hash(whole)
    for sites in ((2, 3), (0, 6), (7, -1)):
        with pytest.raises(UserError, match=r"source.sites = .*: positive widths that add up to 6 are needed"):
            _ = Arrays(path=path, sites=sites).d_in


def test_the_parts_are_kept_by_a_run(tmp_path):
    np.save(tmp_path / "rows.npy", ROWS)
    data = ["source=arrays", f"source.path={tmp_path}", "source.sites=[2,4]"]
    before = config.load("train", config.Config, [*data, "sae.family=crosscoder", "sae.d_sae=8", "sae.k=2"])
    assert before.source == Arrays(path=str(tmp_path), sites=(2, 4))
    (tmp_path / "config.yaml").write_text(config.to_yaml(before))
    assert config.from_run(tmp_path).source == before.source


def test_mistakes_end_in_one_line(tmp_path):
    np.save(tmp_path / "cube.npy", np.zeros((4, 3, 2), np.float32))
    np.save(tmp_path / "words.npy", np.array([["a", "b"]]))
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    np.save(tmp_path / "mixed" / "a.npy", np.zeros((4, 3)))
    np.save(tmp_path / "mixed" / "b.npy", np.zeros((4, 2)))
    save_file({"a": ROWS, "b": ROWS}, tmp_path / "two.safetensors")
    cases = {
        "missing.npy": "no .npy or .safetensors file",
        "empty": "no .npy or .safetensors file",
        "cube.npy": r"shape \(4, 3, 2\)",
        "words.npy": "real numbers are needed",
        "text.npy": "not a readable .npy file",
        "text.safetensors": "not a .safetensors file",
        "mixed": r"b.npy: width 2, but .*a.npy has 3",
        "two.safetensors": "holds a, b",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            _ = Arrays(path=str(tmp_path / name)).d_in
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="source.heldout_share = 1"):
        Arrays(path="x", heldout_share=1.0)


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    save_file({"a": ROWS}, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-8])
    with pytest.raises(UserError, match="the data of tensor a is cut off"):
        _ = Arrays(path=str(tmp_path / "cut.safetensors")).d_in


def test_fingerprints_tell_data_apart(tmp_path):
    for name, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS + 1)):
        np.save(tmp_path / f"{name}.npy", rows)
    a, b, c = (Arrays(path=str(tmp_path / f"{n}.npy")).fingerprint()["parts"][0] for n in "abc")
    assert a["sha256_of_ends"] == b["sha256_of_ends"] != c["sha256_of_ends"]


def test_a_run_continues_on_moved_files_and_not_on_others(tmp_path):
    for name, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS + 1)):
        np.save(tmp_path / f"{name}.npy", rows)
    a, b, c = (Arrays(path=str(tmp_path / f"{name}.npy")) for name in "abc")
    cut = {"n_lanes": 2, "block_rows": 6, "lanes": range(2), "seed": 0}
    stream = a.open(**cut)
    next(stream)
    state, expected = stream.get_state(), next(stream)
    moved = b.open(**cut)
    moved.set_state(state)
    np.testing.assert_array_equal(next(moved), expected)
    with pytest.raises(UserError, match="continue: data was"):
        c.open(**cut).set_state(state)


@pytest.mark.parametrize("share", [0.0, 1e-4])
def test_a_share_below_one_row_holds_none_out(tmp_path, share):
    np.save(tmp_path / "rows.npy", ROWS)
    source = Arrays(path=str(tmp_path / "rows.npy"), heldout_share=share)
    assert source.n_train() == len(ROWS) and list(source.heldout(4)) == [] == list(source.heldout(4, 1))


@pytest.mark.parametrize("sites", [(), (2, 4)])
def test_what_is_said_of_a_source_opens_no_file(tmp_path, sites):
    source = Arrays(path=str(tmp_path / "moved_away.npy"), sites=sites)
    assert source.sites == sites
    assert config.to_plain(source)["sites"] == list(sites)
    assert "moved_away.npy" in config.to_yaml(source) + repr(source)
