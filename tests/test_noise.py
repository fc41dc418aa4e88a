"""Rank rules for signals in noise: what they must find, what they must not, and where they say that they break."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flora_tensor as ft
from flora_tensor import _whiteness, noise
from flora_tensor import ranks as ranks_module
from flora_tensor._whiteness import not_white
from flora_tensor.noise import edge_squared, projected_edge, worth_storing
from support import dense, orthonormal, seeds

RANKS = (5, 4, 2, 2)
PLANTED = [((32, 24, 3, 3), 20), ((32, 24, 3, 3), 0), ((32, 24, 3, 3), -3), ((64, 48, 3, 3), -3), ((16,) * 4, -15)]


def signal(rng: np.random.Generator, shape: tuple[int, ...], ranks: tuple[int, ...]) -> np.ndarray:
    """Return a tensor of these ranks whose unfoldings have singular values within a factor of two of each other."""
    core = rng.standard_normal(ranks)
    for _ in range(60):
        for mode in range(len(ranks)):
            u, s, v = np.linalg.svd(ft.unfold(core, mode), full_matrices=False)
            core = ft.fold((u * np.maximum(s, 0.6 * s[0])) @ v, mode, ranks)
    return dense(core, [orthonormal(rng, n, r) for n, r in zip(shape, ranks)])


def planted(seed: int, shape: tuple[int, ...], decibels: float) -> tuple[np.ndarray, float]:
    """Return a signal in white noise at a signal-to-noise ratio, and the noise's deviation."""
    rng = np.random.default_rng(seed)
    x = signal(rng, shape, RANKS)
    deviation = float(np.linalg.norm(x)) / 10 ** (decibels / 20) / math.sqrt(x.size)
    return x + deviation * rng.standard_normal(shape), deviation


@pytest.mark.parametrize(("shape", "decibels"), PLANTED)
def test_the_projected_edge_finds_planted_ranks(shape, decibels):
    trials = [planted(seed, shape, decibels) for seed in range(12)]
    found = [projected_edge(ft.hosvd_spectrum(x)) for x, _ in trials]
    assert [ranks for ranks, _ in found] == [RANKS] * len(trials)
    for (_, deviation), (_, estimate) in zip(trials, found):
        assert estimate == pytest.approx(deviation, rel=0.1)


@pytest.mark.parametrize(("shape", "decibels"), PLANTED)
def test_a_known_deviation_finds_them_too(shape, decibels):
    for seed in range(6):
        x, deviation = planted(seed, shape, decibels)
        assert ft.select_ranks(x, method="noise", noise_floor=deviation).ranks == RANKS


@pytest.mark.parametrize("method", ["evbmf", "bic"])
def test_the_other_rules_find_a_strong_signal(method):
    for seed in range(6):
        x, _ = planted(seed, (32, 24, 3, 3), 5)
        assert ft.select_ranks(x, method=method).ranks == RANKS


def test_gavish_donoho_finds_a_strong_signal_and_never_more_than_the_edge():
    for seed in range(6):
        x, deviation = planted(seed, (32, 24, 3, 3), 10)
        assert ft.select_ranks(x, method="gavish-donoho").ranks == RANKS
        assert ft.select_ranks(x, method="gavish-donoho", noise_floor=deviation).ranks == RANKS


@pytest.mark.parametrize("shape", [(32, 24, 3, 3), (64, 48, 3, 3), (16, 16, 16, 16), (40, 30)])
@pytest.mark.parametrize("method", ["noise", "evbmf", "gavish-donoho"])
def test_pure_noise_has_no_rank(shape, method):
    for seed in range(12):
        noise = np.random.default_rng(1000 + seed).standard_normal(shape)
        assert ft.select_ranks(noise, method=method).ranks == (0,) * len(shape)


def uneven(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    """Return how strong the noise of each slice is, with a mean square of one."""
    strength = np.ones(size)
    if kind == "within three":
        strength = rng.uniform(1.0, 3.0, size)
    elif kind == "half threefold":
        strength[: size // 2] = 3.0
    elif kind == "one loud":
        strength[size // 3] = 10.0
    return strength / math.sqrt(np.mean(strength**2))


@pytest.mark.parametrize("kind", ["within three", "half threefold", "one loud"])
@pytest.mark.parametrize("shape", [(32, 24, 3, 3), (64, 48, 3, 3)])
def test_slices_of_unequal_noise_do_not_mislead_the_projected_edge(shape, kind):
    """Odd seeds have uneven noise in two modes.

    Of 40 trials each, 39 or 40 were right, but for two slices that are both ten times as loud and cross: 34 and 25.
    """
    right = Counter[int]()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = signal(rng, shape, RANKS)
        deviation = np.linalg.norm(x) / 10 ** (5 / 20) / math.sqrt(x.size)
        noise = uneven(rng, kind, shape[0])[:, None, None, None] * rng.standard_normal(shape)
        if seed % 2:
            noise *= uneven(rng, kind, shape[1])[:, None, None]
        ranks, estimate = projected_edge(ft.hosvd_spectrum(x + deviation * noise))
        if ranks == RANKS:  # where two loud slices cross, few entries carry most of the noise
            right[seed % 2] += 1
            assert estimate == pytest.approx(deviation * math.sqrt(np.mean(noise**2)), rel=0.35)
    assert right[0] >= 9
    assert right[1] >= (4 if kind == "one loud" else 9)


def test_a_noise_rule_computes_each_answer_once_and_gives_up_soon_where_there_is_no_bulk(monkeypatch):
    """Without a bulk of noise the balancing of slices cannot end well; each of its rounds is a full HOSVD."""
    calls = Counter[str]()

    def counted(module, name):
        original = getattr(module, name)

        def call(*arguments):
            calls[name] += 1
            return original(*arguments)

        monkeypatch.setattr(module, name, call)

    for module, name in ((noise, "hosvd_spectrum"), (noise, "bic"), (ranks_module, "bic")):
        counted(module, name)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        fall = [np.arange(1, n + 1) ** -0.6 for n in (32, 32, 5, 5)]
        x = dense(rng.standard_normal((32, 32, 5, 5)), [orthonormal(rng, f.size, f.size) * f for f in fall])
        x *= np.exp(rng.standard_normal((32, 1, 1, 1)))
        spectrum = ft.hosvd_spectrum(x)
        for method in ("noise", "evbmf", "bic", "gavish-donoho"):
            calls.clear()
            ft.select_ranks(spectrum, method=method)
            assert calls["bic"] == 1
            assert calls["hosvd_spectrum"] <= 8


def test_noise_of_unequal_strength_is_no_signal():
    for seed in range(12):
        rng = np.random.default_rng(seed)
        noise = rng.uniform(1.0, 3.0, 32)[:, None, None, None] * rng.standard_normal((32, 24, 3, 3))
        assert ft.select_ranks(noise, method="noise").ranks == (0, 0, 0, 0)


# --- what the notes say of the noise ------------------------------------------------------------------


def student(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_t(2.5, shape)


def falling(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return noise whose first unfolding falls like 1/k: no bulk, no gap."""
    rows = shape[0]
    return ft.mode_dot(rng.standard_normal(shape), orthonormal(rng, rows, rows) / np.arange(1, rows + 1), 0)


def smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return noise in which neighbors along the second mode have a correlation of 0.45."""
    steps = rng.standard_normal((shape[0], shape[1] + 1, *shape[2:]))
    return steps[:, 1:] + 0.7 * steps[:, :-1]


@pytest.mark.parametrize("make", [student, falling, smooth])
@pytest.mark.parametrize("method", ["noise", "bic", "evbmf", "gavish-donoho"])
def test_heavy_tails_and_colored_noise_are_noted(make, method):
    """With a signal of 5 dB and without one; whether or not the ranks came out right."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        noise = make(rng, (32, 24, 3, 3))
        noise /= np.linalg.norm(noise)
        planted = signal(rng, noise.shape, RANKS)
        for x in (noise, noise + planted / np.linalg.norm(planted) * 10 ** (5 / 20)):
            notes = ft.select_ranks(x, method=method).notes
            assert any("not white" in note for note in notes)
            if make is student:
                assert any("heavy tails" in note for note in notes)


@pytest.mark.parametrize("method", ["noise", "bic"])
def test_the_mode_along_which_noise_is_correlated_is_named(method):
    noise = smooth(np.random.default_rng(0), (32, 24, 3, 3))
    (note,) = ft.select_ranks(noise + 40 * planted(1, noise.shape, 300)[0], method=method).notes
    assert "stronger in some directions than in others, most clearly in mode 1" in note


@pytest.mark.parametrize("method", ["noise", "evbmf", "bic"])
def test_a_noise_rule_keeps_to_a_cap_and_says_so(method):
    x, _ = planted(0, (32, 24, 3, 3), 20)
    free = ft.select_ranks(x, method=method)
    assert free.ranks == ft.select_ranks(x, method=method, max_ranks=RANKS).ranks == RANKS
    capped = ft.select_ranks(x, method=method, max_ranks=(3, 24, 3, 3))
    assert capped.ranks == (3, *RANKS[1:])
    assert [n for n in capped.notes if n not in free.notes] == [f"ranks are capped at {capped.ranks} by max_ranks"]


WHITE = [
    ((32, 24, 3, 3), RANKS),
    ((16, 16, 16, 16), RANKS),
    ((20, 20, 20), (0, 0, 0)),
    ((300, 3, 3), (0, 0, 0)),
    ((100, 4, 4), (5, 3, 3)),
    ((120, 180), (12, 12)),
    ((60, 60), (0, 0)),
]


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize(("shape", "ranks"), WHITE)
def test_scores_of_white_noise_are_nearly_standard_normal(shape, ranks, dtype):
    """So the five standard deviations that a note needs are a false alarm in a million.

    The means of 40 trials are within 0.16 · 4; and a model that explains a tenth of the entries, unevenly, adds up to
    two to the fourth moment's (measured).
    """
    found: list[list[float]] = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if dtype == "complex128" else 0.0)
        if any(ranks):
            planted = signal(rng, shape, ranks)
            x = x + planted * (2 * np.linalg.norm(x) / np.linalg.norm(planted))
        assert not_white(x, ranks, balanced=len(shape) > 2) == ()
        found.append(scores(x, ranks))
    tails, *directions = np.array(found).T
    assert -0.64 <= np.mean(tails) <= 2.64
    assert 0.6 <= np.std(tails) <= 1.4
    for score in directions:
        if score.any():  # one direction alone has nothing to compare with
            assert abs(np.mean(score)) <= 0.64
            assert 0.6 <= np.std(score) <= 1.4


def scores(x: np.ndarray, ranks: tuple[int, ...]) -> list[float]:
    """Return the scores that `not_white` compares with five."""
    factors = _whiteness._model(x, ranks)
    rest = _whiteness._left_over(x, factors)
    excess = _whiteness._excess_kurtosis(rest)
    spheres = [_whiteness._sphericity_score(x, k, u, excess) for k, u in enumerate(factors)]
    return [_whiteness._kurtosis_score(rest, excess), *spheres]


@given(seed=seeds, size=st.integers(100, 3000), power=st.floats(1.0, 2.0))
def test_the_kurtosis_score_is_that_of_scipy(seed, size, power):
    stats = pytest.importorskip("scipy.stats")
    x = np.random.default_rng(seed).standard_normal(size)
    x = np.sign(x) * np.abs(x) ** power
    x = x - x.mean()  # a residual is not centered: its mean is zero beforehand
    excess = _whiteness._excess_kurtosis(x)
    assert excess == pytest.approx(stats.kurtosis(x), rel=1e-9, abs=1e-9)
    assert _whiteness._kurtosis_score(x, excess) == pytest.approx(stats.kurtosistest(x).statistic, rel=1e-9, abs=1e-9)


def test_odd_residuals_are_answered():
    """Nothing, next to nothing, and what is rounding say nothing; models of most entries are told."""
    rng = np.random.default_rng(0)
    exact = signal(rng, (32, 24, 3, 3), RANKS)
    for x, ranks in ((exact, RANKS), (np.zeros((20, 20)), (0, 0)), (rng.standard_normal((5, 4, 3)), (0, 0, 0))):
        assert not_white(x, ranks, balanced=True) == ()
    assert "no bulk of noise" in not_white(rng.standard_normal((20, 20)), (10, 10), balanced=False)[0]


@given(seed=seeds, exponent=st.integers(-200, 200), method=st.sampled_from(["noise", "evbmf", "bic", "gavish-donoho"]))
def test_noise_rules_do_not_see_the_scale(seed, exponent, method):
    x = np.random.default_rng(seed).standard_normal((12, 10, 3))
    x[:2] *= 8
    scaled = np.ldexp(x, exponent)
    assert ft.select_ranks(x, method=method).ranks == ft.select_ranks(scaled, method=method).ranks


@given(seed=seeds, method=st.sampled_from(["noise", "evbmf", "bic", "gavish-donoho"]))
def test_noise_rules_permute_with_the_modes(seed, method):
    x = np.random.default_rng(seed).standard_normal((9, 7, 4))
    x[0] *= 12
    turned = np.transpose(x, (2, 0, 1))
    a, b = ft.select_ranks(x, method=method).ranks, ft.select_ranks(turned, method=method).ranks
    assert (a[2], a[0], a[1]) == b


@pytest.mark.parametrize("method", ["noise", "evbmf", "bic", "gavish-donoho"])
def test_dead_channels_do_not_pass_for_little_noise(method):
    for seed in range(4):
        x, _ = planted(seed, (32, 24, 3, 3), 8)
        padded = np.zeros((40, 29, 3, 3))
        padded[:32, 3:27] = x
        assert ft.select_ranks(padded, method=method).ranks == RANKS
        assert ft.select_ranks(padded.astype(np.float32), method=method).ranks == RANKS


def test_a_tensor_without_noise_is_all_signal():
    x = signal(np.random.default_rng(0), (12, 10, 3, 3), RANKS)
    assert ft.select_ranks(x, method="noise").ranks == RANKS


def test_a_noise_floor_caps_other_criteria():
    x, deviation = planted(0, (32, 24, 3, 3), 0)
    free = ft.select_ranks(x, max_ratio=0.9)
    capped = ft.select_ranks(x, max_ratio=0.9, noise_floor=deviation)
    assert all(r >= s for r, s in zip(free.ranks, RANKS))
    assert free.ranks != RANKS
    assert capped.ranks == RANKS
    assert "capped" in capped.notes[0]
    tight = ft.select_ranks(x, rtol=0.01, noise_floor=deviation)
    assert tight.ranks == RANKS
    assert any("stands above the tolerance" in note for note in tight.notes)


def test_nothing_above_the_floor_is_rank_zero():
    choice = ft.select_ranks(np.random.default_rng(0).standard_normal((20, 20, 20)), max_ratio=0.5, noise_floor=1.0)
    assert choice.ranks == (0, 0, 0)
    assert choice.n_parameters == 0
    assert choice.notes == ("nothing stands above the noise floor",)


@pytest.mark.parametrize("x", [np.zeros((4, 3, 2)), np.zeros((0, 3)), np.ones((1, 1, 1)), np.arange(5.0)])
@pytest.mark.parametrize("method", ["noise", "evbmf", "bic", "gavish-donoho"])
def test_odd_tensors_are_answered(x, method):
    ranks = ft.select_ranks(x, method=method).ranks
    assert len(ranks) == x.ndim
    assert all(0 <= r <= n for r, n in zip(ranks, x.shape))


@given(seed=seeds, dtype=st.sampled_from(["float16", "bfloat16", "float32"]))
def test_rounding_noise_is_the_deviation_of_rounding(seed, dtype):
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    exact = np.random.default_rng(seed).standard_normal(4000) * 0.1
    stored = exact.astype(kind).astype(np.float64)
    measured = math.sqrt(np.mean((stored - exact) ** 2))
    assert ft.rounding_noise(stored, dtype) == pytest.approx(measured, rel=0.05)


def test_rounding_noise_of_nothing_and_of_zeros():
    assert ft.rounding_noise(np.zeros(0), "float32") == 0.0
    assert ft.rounding_noise(np.zeros(3), "float16") == pytest.approx(2.0**-24 / math.sqrt(12))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_merged_low_rank_update_comes_back_with_its_rank(dtype, tmp_path):
    """Truth is known exactly: an update of rank 8 is added to a weight, stored, and extracted again."""
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file

    kind = getattr(torch, dtype)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        kernel = rng.standard_normal((64, 64, 3, 3)) / 20
        matrix = rng.standard_normal((160, 160)) / 20
        changes = {
            "conv.weight": dense(
                rng.standard_normal((8, 8, 2, 2)), [orthonormal(rng, n, r) for n, r in zip(kernel.shape, (8, 8, 2, 2))]
            ),
            "fc.weight": orthonormal(rng, 160, 8) @ orthonormal(rng, 160, 8).T,
        }
        base = {"conv.weight": torch.tensor(kernel).to(kind), "fc.weight": torch.tensor(matrix).to(kind)}
        tuned = {}
        for name, weight in base.items():
            change = changes[name] * (0.03 * float(weight.double().norm()) / np.linalg.norm(changes[name]))
            tuned[name] = (weight.double() + torch.tensor(change)).to(kind)
        save_file(base, tmp_path / "base.safetensors")
        save_file(tuned, tmp_path / "tuned.safetensors")
        paths = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
        report = ft.extract(*paths, None, dry_run=True, max_ratio=0.5)
        assert report["fc.weight"].ranks[0] == 8
        assert (report["conv.weight"].arrangement, report["conv.weight"].ranks) == ("o i h w", (8, 8, 2, 2))
        free = ft.extract(*paths, None, dry_run=True, max_ratio=0.5, noise_floor=None)
        assert free["fc.weight"].ranks[0] > 8 or dtype == "float32"


def test_an_update_below_the_floor_is_refused_with_the_way_out(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file

    rng = np.random.default_rng(0)
    weight = torch.tensor(rng.standard_normal((64, 64)), dtype=torch.float32)
    save_file({"fc.weight": weight}, tmp_path / "base.safetensors")
    save_file({"fc.weight": weight + 0.01 * torch.randn(64, 64)}, tmp_path / "tuned.safetensors")
    paths = (tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    with pytest.raises(ValueError, match="no change stands above the rounding noise of its storage type; pass noise_f"):
        ft.extract(*paths, tmp_path / "out", max_ratio=0.9, noise_floor=0.02)
    assert ft.extract(*paths, tmp_path / "out", max_ratio=0.9, noise_floor=None)["fc.weight"].ranks[0] > 0


def test_worth_storing_stops_where_parameters_fit_noise():
    x, deviation = planted(3, (32, 24, 3, 3), 5)
    spectrum = ft.hosvd_spectrum(x)
    native = spectrum.frontier()
    matrix = ft.hosvd_spectrum(ft.unfold(x, 0)).frontier()
    kept = worth_storing([native, matrix], deviation)
    assert tuple(kept[0].ranks[-1]) == RANKS
    assert kept[1].n_parameters[-1] <= kept[0].n_parameters[-1]
    assert all(len(f) >= 1 and f.n_parameters[0] == 0 for f in kept)
    assert [len(f) for f in worth_storing([native, matrix], 0.0)] == [
        int(np.searchsorted(f.n_parameters, native.n_parameters[-1], side="right")) for f in (native, matrix)
    ]


def test_the_edge_is_above_the_largest_singular_value_of_noise():
    rng = np.random.default_rng(0)
    for rows, columns in ((10, 10), (5, 200), (60, 40)):
        largest = max(np.linalg.norm(rng.standard_normal((rows, columns)), 2) ** 2 for _ in range(50))
        assert largest < edge_squared(rows, columns) < 2 * largest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "elbow"}, "method is 'elbow'; pass one of 'noise', 'evbmf', 'bic', 'gavish-donoho'"),
        (
            {"method": "noise", "noise_floor": -1.0},
            "noise_floor is -1.0; pass a finite standard deviation of at least 0",
        ),
        ({"rtol": 0.1, "noise_floor": math.nan}, "noise_floor is nan; pass a finite standard deviation"),
    ],
)
def test_wrong_noise_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ft.select_ranks(np.ones((3, 3)), **options)


def test_rounding_noise_refuses_other_types():
    with pytest.raises(ValueError, match="dtype is 'int8'; pass one of 'float64', 'float32'"):
        ft.rounding_noise(np.ones(3), "int8")


@pytest.mark.parametrize("floor", ["high", -1, math.inf])
def test_extract_refuses_other_noise_floors(floor, tmp_path):
    with pytest.raises(ValueError, match=r"extract: noise_floor is .*; pass 'auto', None, or a finite number"):
        ft.extract(tmp_path / "a", tmp_path / "b", tmp_path / "c", noise_floor=floor)


@given(seed=seeds)
def test_effective_ranks_lie_between_one_and_the_number_of_values(seed):
    x = np.random.default_rng(seed).standard_normal((6, 5, 4)) * np.linspace(1, 3, 4)
    described = ft.effective_ranks(x)
    for field in (described.entropy, described.stable, described.participation):
        assert all(1 <= value <= n + 1e-9 for value, n in zip(field, x.shape))
    assert ft.effective_ranks(ft.hosvd_spectrum(x)).stable == pytest.approx(described.stable)


def test_effective_ranks_of_known_spectra():
    assert ft.effective_ranks(np.eye(4)).entropy == pytest.approx((4.0, 4.0))
    assert ft.effective_ranks(np.eye(4)).participation == pytest.approx((4.0, 4.0))
    assert ft.effective_ranks(np.diag([3.0, 4.0])).stable == pytest.approx((25 / 16, 25 / 16))
    assert ft.effective_ranks(np.zeros((2, 3))).entropy == (0.0, 0.0)


@pytest.mark.parametrize("method", ["noise", "evbmf", "bic", "gavish-donoho"])
def test_modes_of_size_one_change_nothing(method):
    """As of a 1×1 kernel; and where all slices but one hold nothing, that one is looked at as if it were alone."""
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal((64, 3)) @ rng.standard_normal((3, 48)) + rng.standard_normal((64, 48))
    assert ft.select_ranks(x, method=method).ranks == (3, 3)
    assert ft.select_ranks(x[:, :, None, None], method=method).ranks == (3, 3, 1, 1)
    alone = np.zeros((6, *x.shape))
    alone[2] = x
    assert ft.select_ranks(alone, method=method).ranks == (1, 3, 3)
    assert not any(ft.select_ranks(rng.standard_normal((64, 48, 1)), method=method).ranks)
