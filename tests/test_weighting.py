"""Calibrated extraction: the error of the layers' outputs, against closed forms and against outputs themselves."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
import flora_torch
from checkpoints import run, save
from flora_tensor._weighting import FLOOR, Calibration, Weighting
from flora_torch.digits import DigitsNet, digits, shifted, train
from support import distance, seeds, tolerance


def spd(rng: np.random.Generator, n: int, condition: float = 30.0) -> np.ndarray:
    """Return a second moment whose eigenvalues no floor touches."""
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return (q * np.geomspace(1.0, condition, n)) @ q.T


def pair(directory: Path, **changes: np.ndarray) -> tuple[Path, Path]:
    base = {name: np.zeros_like(change) for name, change in changes.items()}
    return save(directory / "b.safetensors", base), save(directory / "t.safetensors", changes)


def moments(**given: tuple[str, np.ndarray]) -> ft.Moments:
    values = {name: array for name, (_, array) in given.items()}
    return ft.Moments(values, {name: axes for name, (axes, _) in given.items()}, dict.fromkeys(values, 100))


def closed_form(delta: np.ndarray, moment: np.ndarray, rank: int) -> np.ndarray:
    """Return the best approximation of a rank under ‖· L‖, C = L Lᵀ, by Cholesky and a truncated SVD."""
    lower = np.linalg.cholesky(moment)
    u, s, vt = np.linalg.svd(delta @ lower, full_matrices=False)
    return np.linalg.solve(lower.T, ((u[:, :rank] * s[:rank]) @ vt[:rank]).T).T


@given(seed=seeds, rows=st.integers(2, 9), columns=st.integers(2, 9), rank=st.integers(1, 3))
def test_a_matrix_gets_the_closed_form(tmp_path_factory, seed, rows, columns, rank):
    rng, directory = np.random.default_rng(seed), tmp_path_factory.mktemp("weighting")
    delta, moment = rng.standard_normal((rows, columns)), spd(rng, columns)
    files = pair(directory, w=delta)
    report = ft.extract(*files, directory / "a", ranks=rank, dtype="float64", calibration=moments(w=("i", moment)))
    best = closed_form(delta, moment, rank)
    found = ft.load_adapter(directory / "a").delta("w")
    root = np.linalg.cholesky(moment)
    size = np.linalg.norm(delta @ root)
    error, least = np.linalg.norm((delta - found) @ root) / size, np.linalg.norm((delta - best) @ root) / size
    assert error == pytest.approx(least, rel=1e-9, abs=1e-12)
    assert report.weighted_error == pytest.approx(error, rel=1e-9, abs=1e-12)
    assert report["w"].weighted_norm == pytest.approx(size, rel=1e-9)
    assert report.relative_error == pytest.approx(distance(delta, found) / np.linalg.norm(delta), rel=1e-9, abs=1e-12)


@given(seed=seeds, shape=st.sampled_from([(5, 4, 3, 3), (4, 6, 3), (6, 5)]), diagonal=st.booleans())
def test_scaling_back_undoes_scaling(seed, shape, diagonal):
    rng = np.random.default_rng(seed)
    weight, moment = rng.standard_normal(shape), spd(rng, shape[1])
    weighting = Weighting.of(np.diag(moment) if diagonal else moment, (1,))
    root = np.diag(np.sqrt(np.diag(moment))) if diagonal else np.real(weighting.root)
    scaled = weighting.scale(weight)
    np.testing.assert_allclose(scaled, np.einsum("oi...,ij->oj...", weight, root), atol=1e-12)
    for arrangement in ft.Arrangement.candidates(len(shape)):
        assert weighting.fits(arrangement)
        whole = ft.TuckerTensor(arrangement.arrange(scaled), (None,) * arrangement.n_modes)
        truncated = ft.tucker(arrangement.arrange(scaled), rtol=1e-13).tucker
        for tucker in (whole, truncated):
            back = arrangement.restore(weighting.unscale(tucker, arrangement).to_tensor(), shape)
            assert distance(back, weight) <= tolerance("float64", *shape, norm=100 * np.linalg.norm(weight))


def patches_of(images: torch.Tensor, kernel: int, padding: int) -> np.ndarray:
    columns = torch.nn.functional.unfold(images, kernel, padding=padding)
    return columns.permute(0, 2, 1).reshape(-1, columns.shape[1]).double().numpy()


def test_the_weighted_error_is_the_error_of_the_outputs(tmp_path: Path):
    """On the data that the moments come from, the report's numbers are those of the convolution's outputs."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 6, 3, padding=1, bias=False).double()
    images = torch.randn(20, 4, 5, 5, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.3, 1.0]).double()[:, None, None]
    model = torch.nn.Sequential(layer)
    collected = flora_torch.collect_moments(model, [images])
    change = torch.randn_like(layer.weight)
    files = pair(tmp_path, **{"0.weight": change.numpy()})
    report = ft.extract(*files, tmp_path / "a", max_ratio=0.4, dtype="float64", calibration=collected)
    assert report["0.weight"].arrangement == "o (i h w)"
    stored = torch.from_numpy(ft.load_adapter(tmp_path / "a").delta("0.weight"))
    wanted, got = (torch.nn.functional.conv2d(images, w, padding=1) for w in (change, stored))
    error = float((wanted - got).norm() / wanted.norm())
    # The moments are float64 here, and no eigenvalue is below the floor.
    assert report.weighted_error == pytest.approx(error, rel=1e-6)
    assert report["0.weight"].weighted_norm == pytest.approx(float(wanted.square().sum(1).mean().sqrt()), rel=1e-6)
    plain = ft.extract(*files, tmp_path / "p", max_ratio=0.4, dtype="float64", arrangements="o (i h w)")
    other = torch.from_numpy(ft.load_adapter(tmp_path / "p").delta("0.weight"))
    assert error < float((torch.nn.functional.conv2d(images, other, padding=1) - wanted).norm() / wanted.norm())
    assert plain.n_parameters >= report.n_parameters
    assert plain.relative_error < report.relative_error


def test_the_moment_of_the_channels_goes_with_every_arrangement(tmp_path: Path):
    rng = np.random.default_rng(0)
    files = pair(tmp_path, conv=rng.standard_normal((8, 6, 3, 3)), fc=rng.standard_normal((8, 6)))
    given = moments(conv=("i", spd(rng, 6)), fc=("i", spd(rng, 6)))
    for arrangement in ("o i h w", "o (i h w)", "(o h) (i w)"):
        options = {"arrangements": arrangement, "calibration": given, "overwrite": True}
        report = ft.extract(*files, tmp_path / "a", max_ratio=0.5, **options)
        assert report["conv"].arrangement == arrangement
        assert 0 < report["conv"].weighted_error < 1
    whole = moments(conv=("i h w", spd(rng, 54)))
    with pytest.raises(ft.InputError, match=r"no moment that fits a changed weight; .*patches=False"):
        ft.extract(*files, None, dry_run=True, arrangements="o i h w", calibration=whole, include="conv")


@pytest.mark.parametrize("budget", [{"rtol": 0.3}, {"max_ratio": 0.3}, {"max_parameters": 90}])
def test_budgets_and_tolerances_are_kept_in_the_norm_that_counts(tmp_path: Path, budget):
    rng = np.random.default_rng(1)
    files = pair(tmp_path, a=rng.standard_normal((12, 10)), b=rng.standard_normal((8, 6, 3, 3)))
    given = moments(a=("i", spd(rng, 10, 300)), b=("i", 5 * spd(rng, 6, 300)))
    report = ft.extract(*files, tmp_path / "a", calibration=given, **budget)
    plain = ft.extract(*files, tmp_path / "p", **budget)
    if "rtol" in budget:
        assert report.weighted_error <= 0.3 + 1e-6
    else:
        assert report.n_parameters <= (0.3 * report.dense_parameters if "max_ratio" in budget else 90)
        adapter = ft.load_adapter(tmp_path / "p")
        size = lost = 0.0
        for name in ("a", "b"):
            weighting = Calibration.of(given).weighting(name, adapter.shapes.get(name, plain[name].shape))
            change = ft.open_checkpoint(files[1]).read(name).astype(np.float64)
            kept = adapter.delta(name, dtype="float64") if name in adapter else 0 * change
            size += np.linalg.norm(weighting.scale(change)) ** 2
            lost += np.linalg.norm(weighting.scale(change - kept)) ** 2
        assert report.weighted_error < np.sqrt(lost / size)
    assert report.lower_bound is not None
    dry = ft.extract(*files, None, dry_run=True, calibration=given, **budget)
    assert dry.weighted_error == pytest.approx(report.weighted_error, rel=0.1)
    assert np.isnan(dry.relative_error)
    assert dry.to_dict()["totals"]["relative_error"] is None


def test_inputs_that_never_vary_cost_nothing_and_break_nothing(tmp_path: Path):
    """Half of the inputs are always zero: what the weight does to the other half is kept."""
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((8, 10))
    live = spd(rng, 5)
    moment = np.zeros((10, 10))
    moment[:5, :5] = live
    files = pair(tmp_path, w=delta)
    given = moments(w=("i", moment))
    ft.extract(*files, tmp_path / "a", ranks=5, dtype="float64", calibration=given)
    found = ft.load_adapter(tmp_path / "a").delta("w")
    assert np.isfinite(found).all()
    dead = np.linalg.norm(delta[:, 5:]) * np.sqrt(FLOOR * np.trace(live) / 10)
    assert np.linalg.norm((found - delta)[:, :5] @ np.linalg.cholesky(live)) <= dead
    assert Weighting.of(np.zeros((3, 3)), (1,)) is None


def test_weights_without_a_moment_count_by_their_plain_error(tmp_path: Path):
    rng = np.random.default_rng(0)
    files = pair(tmp_path, a=rng.standard_normal((8, 6)), b=rng.standard_normal((8, 6)), z=rng.standard_normal((8, 6)))
    given = moments(a=("i", spd(rng, 6)), z=("i", np.zeros((6, 6))))
    report = ft.extract(*files, tmp_path / "a", max_ratio=0.6, calibration=given)
    for name in ("b", "z"):
        assert report[name].notes == ("no moment of its input: the plain error counts",)
        assert report[name].weighted_error == pytest.approx(report[name].relative_error)
    assert report["a"].notes == ()


def test_an_embedding_by_how_often_its_rows_are_looked_up(tmp_path: Path):
    """Rows that are looked up count; the moment of an embedding is a diagonal over its first axis."""
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((12, 6))
    often = np.array([0.15] * 6 + [0.1 / 6] * 6)
    files = pair(tmp_path, embed=delta)
    report = ft.extract(*files, tmp_path / "a", ranks=2, dtype="float64", calibration=moments(embed=("o", often)))
    found = ft.load_adapter(tmp_path / "a").delta("embed")
    best = closed_form(delta.T, np.diag(often), 2).T
    weigh = np.sqrt(often)[:, None]
    assert np.linalg.norm(weigh * (found - delta)) == pytest.approx(np.linalg.norm(weigh * (best - delta)), rel=1e-9)
    assert report.weighted_error is not None


def test_refusals(tmp_path: Path):
    rng = np.random.default_rng(0)
    files = pair(tmp_path, w=rng.standard_normal((8, 6)))
    with pytest.raises(ft.InputError, match=r"moment of 'w' over the axes 'i' is of size 5, but these axes .* have 6"):
        ft.extract(*files, None, dry_run=True, calibration=moments(w=("i", spd(rng, 5))))
    with pytest.raises(ft.InputError, match=r"the moment of 'w' over the axes 'i h w' does not fit a weight of shape"):
        ft.extract(*files, None, dry_run=True, calibration=moments(w=("i h w", spd(rng, 6))))
    with pytest.raises(ft.InputError, match="no moment that fits a changed weight; collect the moments of this model"):
        ft.extract(*files, None, dry_run=True, calibration=moments(other=("i", spd(rng, 6))))
    with pytest.raises(ft.InputError, match="not a file of moments"):
        ft.extract(*files, None, dry_run=True, calibration=files[0])
    with pytest.raises(FileNotFoundError):
        ft.extract(*files, None, dry_run=True, calibration=tmp_path / "nothing")


def test_a_file_and_the_command_line(tmp_path: Path):
    rng = np.random.default_rng(0)
    files = pair(tmp_path, w=rng.standard_normal((8, 6)))
    given = moments(w=("i", spd(rng, 6)))
    file = ft.save_moments(tmp_path / "m.safetensors", given)
    done = run("extract", *files, "-o", tmp_path / "a", "--ranks", "2", "--calibration", file, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    report = ft.extract(*files, tmp_path / "b", ranks=2, calibration=given)
    assert told["totals"]["weighted_error"] == pytest.approx(report.weighted_error, rel=1e-12)
    assert told["options"]["calibration"] == str(file)
    shown = run("extract", *files, "-o", tmp_path / "c", "--ranks", "2", "--calibration", file)
    assert "in the outputs" in shown.stdout
    # Other moments are other options: an interrupted run does not go on with them.
    again = pickle.loads(pickle.dumps(Calibration.of(given)))
    assert again.digest == Calibration.of(given).digest
    assert Calibration.of(moments(w=("i", spd(rng, 6)))).digest != again.digest


def test_the_outputs_of_a_trained_network_on_held_out_data(tmp_path: Path):
    """At equal size the calibrated adapter of a fine-tuned network changes its held-out layer outputs less."""
    task = digits()
    moved = shifted(task)
    model = DigitsNet(12)
    train(model, task.train, task.train_labels, epochs=4, learning_rate=3e-3)
    base = save(tmp_path / "b.safetensors", model.state_dict())
    train(model, moved.train, moved.train_labels, epochs=6, learning_rate=3e-3)
    tuned = save(tmp_path / "t.safetensors", model.state_dict())
    seen = flora_torch.collect_moments(model, moved.train.split(200), patches=False)
    held_out = flora_torch.collect_moments(model, moved.test.split(200))
    errors = []
    for calibration in (None, seen):
        report = ft.extract(base, tuned, tmp_path / "a", max_ratio=0.15, calibration=calibration, overwrite=True)
        assert report.ratio <= 0.15
        adapter, lost, size = ft.load_adapter(tmp_path / "a"), 0.0, 0.0
        for name, moment in held_out.items():
            change = ft.open_checkpoint(tuned).read(name) - ft.open_checkpoint(base).read(name)
            kept = adapter.delta(name) if name in adapter else 0 * change
            rows, lost_rows = change.reshape(len(change), -1), (change - kept).reshape(len(change), -1)
            moment = np.asarray(moment)
            lost += float(np.einsum("oi,ij,oj->", lost_rows, moment, lost_rows))
            size += float(np.einsum("oi,ij,oj->", rows, moment, rows))
        errors.append(np.sqrt(lost / size))
    assert errors[1] < 0.95 * errors[0]
