"""Extraction on three networks fine-tuned here: never worse than other tools' layouts at the same size."""

from pathlib import Path

import pytest
import torch

from benchmarks.extraction_quality import CALIBRATED, OURS, PEERS, RECIPES, STACKED, Trained, compare, fine_tuned

BUDGETS = (0.02, 0.05, 0.2, 0.5)


@pytest.fixture(scope="module", params=list(RECIPES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return fine_tuned(request.param, tmp_path_factory.mktemp("networks"), small=True)
    finally:
        torch.set_num_threads(threads)


def test_extraction_is_never_above_another_layout_at_its_size(trained: Trained):
    rows = compare(trained, BUDGETS)
    size = sum(delta.size for delta in trained.deltas.values())
    for budget in BUDGETS:
        at = {row.layout: row for row in rows if row.max_ratio == budget}
        assert all(row.n_parameters <= budget * size for row in at.values())
        # 1e-4: an allocation ends with the best choice, or within 0.01 % of its bound.
        assert at[OURS].relative_error <= min(at[peer].relative_error for peer in PEERS) * (1 + 1e-4)
        # The calibration comes from training images, the error of the outputs is that on held-out ones.
        # A hundred numbers, as 2 % of these small networks are, hold hardly one rank a layer: no claim there.
        assert budget < 0.05 or at[CALIBRATED].output_error < at[OURS].output_error
        assert STACKED not in at or at[STACKED].relative_error <= at[OURS].relative_error * (1 + 1e-6)
        assert at[CALIBRATED].relative_error >= at[OURS].relative_error * (1 - 1e-4)


def test_networks_are_deterministic(tmp_path: Path):
    first, second = (fine_tuned("ViT", tmp_path / name, small=True) for name in "ab")
    assert first.tuned.read_bytes() == second.tuned.read_bytes()
