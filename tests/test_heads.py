"""Attention heads as a mode: where they are found, and that extraction takes them where they pay."""

import json
from pathlib import Path

import numpy as np
import pytest

import flora_tensor as ft
from checkpoints import load, run, save
from flora_tensor._heads import Heads, heads_beside
from support import dense, orthonormal, tolerance

SHAPE, HEADS = (24, 18), 4
FIRST = "(heads d) i -> heads d i"
LAST = "o (heads d) -> o heads d"


def patterns(name: str, shape: tuple[int, ...], heads: Heads) -> list[str]:
    return [a.pattern for a in heads.arrangements(name, shape)]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "encoder.layer.3.attention.attention.query.weight",
        "encoder.block.0.layer.0.SelfAttention.k.weight",
        "transformer.layer.1.attention.v_lin.weight",
        "unet.attn1.to_q.weight",
        "layers.0.attention.wk.weight",
        "q_proj.weight",
    ],
)
def test_projections_into_heads_are_known_by_name(name):
    assert patterns(name, (24, 18), Heads(4, 4)) == [FIRST]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.o_proj.weight",
        "encoder.layers.0.self_attn.out_proj.weight",
        "encoder.layer.3.attention.output.dense.weight",
        "encoder.block.0.layer.0.SelfAttention.o.weight",
        "unet.attn1.to_out.0.weight",
        "blocks.2.attn.proj.weight",
    ],
)
def test_projections_out_of_heads_are_known_by_name(name):
    assert patterns(name, (18, 24), Heads(4, 4)) == [LAST]


def test_other_weights_have_no_heads():
    for name in ("mlp.fc1.weight", "encoder.layer.3.output.dense.weight", "q_proj.bias", "embed_tokens.weight"):
        assert patterns(name, (24, 24), Heads(4, 4)) == []
    assert patterns("q_proj.weight", (24, 24, 1, 1), Heads(4, 4)) == []
    assert patterns("q_proj.weight", (25, 24), Heads(4, 4)) == []
    assert patterns("q_proj.weight", (24, 24), Heads(4, 4, size=8)) == []
    assert patterns("q_proj.weight", (24, 24), Heads(1, 1)) == []
    assert patterns("q_proj.weight", (4, 24), Heads(4, 4)) == []


def test_grouped_queries_and_fused_projections():
    heads = Heads(8, 2, size=4)
    assert [dict(a.sizes) for a in heads.arrangements("q_proj.weight", (32, 10))] == [{"heads": 8}]
    assert [dict(a.sizes) for a in heads.arrangements("k_proj.weight", (8, 10))] == [{"heads": 2}]
    (fused,) = Heads(4, 4).arrangements("attn.in_proj_weight", (72, 10))
    assert (fused.pattern, fused.shape((72, 10))) == ("(qkv heads d) i -> qkv heads d i", (3, 4, 6, 10))


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"num_attention_heads": 12, "hidden_size": 768}, [Heads(12, 12, 64)]),
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64}, [Heads(8, 2, 16)]),
        ({"n_head": 4, "n_embd": 30}, [Heads(4, 4, None)]),
        ({"num_heads": 2, "d_kv": 8, "d_model": 24}, [Heads(2, 2, 8)]),
        ({"text_config": {"n_heads": 4}, "vision_config": {"n_heads": 3}}, [Heads(4, 4), Heads(3, 3)]),
        ({"num_attention_heads": "twelve", "model_type": "x"}, []),
        ({"num_attention_heads": True}, []),
        ({"num_attention_heads": -4}, []),
    ],
)  # fmt: skip
def test_the_config_beside_a_checkpoint_tells_the_heads(tmp_path: Path, config, found):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert list(heads_beside(tmp_path)) == found
    assert list(heads_beside(tmp_path / "model.safetensors")) == found


def test_a_damaged_config_is_a_warning(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    with pytest.warns(ft.FloraWarning, match=r"no heads are taken from a damaged file: .*pass heads=N"):
        assert heads_beside(tmp_path) == ()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A query and an output projection whose changes have low rank over the heads, and a matrix that has not."""
    rng = np.random.default_rng(0)

    def low(shape: tuple[int, ...], ranks: tuple[int, ...]) -> np.ndarray:
        return dense(rng.standard_normal(ranks), [orthonormal(rng, n, r) for n, r in zip(shape, ranks)])

    base = {n: rng.standard_normal(SHAPE if n[0] == "q" else SHAPE[::-1]) for n in ("q_proj.weight", "o_proj.weight")}
    base["mlp.weight"] = rng.standard_normal(SHAPE)
    change = {
        "q_proj.weight": low((4, 6, 18), (2, 3, 4)).reshape(SHAPE),
        "o_proj.weight": low((18, 4, 6), (3, 2, 3)).reshape(SHAPE[::-1]),
        "mlp.weight": low(SHAPE, (2, 2)),
    }
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"num_attention_heads": HEADS, "hidden_size": 24}))
    tuned = {n: w + change[n] for n, w in base.items()}
    return save(tmp_path / "base" / "model.safetensors", base), save(tmp_path / "tuned.safetensors", tuned)


def test_extraction_takes_the_heads_where_they_pay(pair: tuple[Path, Path], tmp_path: Path):
    report = ft.extract(*pair, tmp_path / "a", rtol=1e-6, dtype="float64")
    assert report["q_proj.weight"].arrangement == FIRST
    assert report["q_proj.weight"].ranks == (2, 3, 4)
    assert report["o_proj.weight"].arrangement == LAST
    assert report["mlp.weight"].arrangement == "o i"
    without = ft.extract(*pair, tmp_path / "b", rtol=1e-6, dtype="float64", heads=None)
    assert without["q_proj.weight"].arrangement == "o i"
    assert report.n_parameters < without.n_parameters
    for budget in (0.05, 0.1, 0.2, 0.4):
        errors = [
            ft.extract(*pair, None, dry_run=True, max_ratio=budget, heads=h).relative_error for h in ("auto", None)
        ]
        assert errors[0] <= errors[1]
    adapter = ft.load_adapter(tmp_path / "a")
    assert dict(adapter.arrangements["q_proj.weight"].sizes) == {"heads": HEADS}
    ft.merge_checkpoint(pair[0], tmp_path / "a", tmp_path / "m.safetensors")
    merged, tuned = load(tmp_path / "m.safetensors"), load(pair[1])
    for name, weight in tuned.items():
        bound = 1e-6 * float(weight.norm()) + tolerance("float64", *weight.shape, norm=float(weight.norm()))
        assert float((merged[name] - weight).norm()) <= bound


def test_the_number_of_heads_may_be_given(pair: tuple[Path, Path], tmp_path: Path):
    (pair[0].parent / "config.json").unlink()
    assert ft.extract(*pair, None, dry_run=True, rtol=1e-6)["q_proj.weight"].arrangement == "o i"
    report = ft.extract(*pair, None, dry_run=True, rtol=1e-6, heads=HEADS)
    assert report["q_proj.weight"].arrangement == FIRST
    assert report.options["heads"] == [HEADS]
    done = run("extract", *pair, "-o", tmp_path / "a", "--rtol", "1e-6", "--heads", HEADS, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["options"]["heads"] == [HEADS]
    assert run("extract", *pair, "--dry-run", "--rtol", "1e-6", "--heads", "none").exit_code == 0
    failed = run("extract", *pair, "--dry-run", "--heads", "many")
    assert failed.exit_code == 2
    assert "'many' is not a number of heads" in failed.stderr
    with pytest.raises(ValueError, match="extract: heads is 0; pass 'auto', None, or the number of heads"):
        ft.extract(*pair, None, dry_run=True, heads=0)


def test_uniform_weights_keep_what_changed_little(tmp_path: Path):
    rng = np.random.default_rng(0)
    base = {name: np.zeros((12, 10)) for name in ("large", "small")}
    tuned = {"large": 1000 * rng.standard_normal((12, 10)), "small": rng.standard_normal((12, 10))}
    pair = save(tmp_path / "b.safetensors", base), save(tmp_path / "t.safetensors", tuned)
    by_norm = ft.extract(*pair, None, dry_run=True, max_ratio=0.5)
    assert by_norm["small"].status == "left out"
    uniform = ft.extract(*pair, None, dry_run=True, max_ratio=0.5, weights="uniform")
    assert uniform["small"].relative_error < 0.8
    assert uniform.relative_error > by_norm.relative_error
    assert uniform.options["weights"] == "uniform"
    with pytest.raises(ValueError, match="extract: weights is 'even'; pass one of 'norm', 'uniform'"):
        ft.extract(*pair, None, dry_run=True, weights="even")
