"""A retain set: what an edit leaves alone."""

import json

import pytest
import torch
from peft import get_peft_model
from stores import write_text_store
from test_collect import BLOCKS, MLP_OUTPUTS
from test_fitting import LAYERS, D, orthonormal, planted
from test_training import adapted, layers_of, trainer_of, weights, write_store
from test_training import planted as planted_pairs
from tiny import tiny_model
from torch.nn import functional

from peft_edit import ActivationStore, HPRTrainer, SEAConfig, fit_sea
from peft_edit.tuners.hpr import maths as hpr
from peft_edit.tuners.hpr.stacked import StackedHPR
from peft_edit.tuners.hpr.train import TokenPairs
from peft_edit.tuners.sea.subspaces import second_moment


def text_rows(basis, count, seed=0, noise=0.0):
    """Rows in the span of a basis, (k, D)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, len(basis), generator=generator, dtype=torch.float64) @ basis
    return rows + noise * torch.randn(rows.shape, generator=generator, dtype=torch.float64)


def modules_of(names):
    return {str(layer): names["llama"].format(layer) for layer in LAYERS}


def retained_mlp(path, rows, **settings):
    """A store of the same rows at every layer."""
    return write_text_store(path, dict.fromkeys(LAYERS, rows), modules=modules_of(MLP_OUTPUTS), site="mlp", **settings)


def retained_blocks(path, rows, **settings):
    return write_text_store(path, rows, modules=modules_of(BLOCKS), **settings)


# The directions


@pytest.mark.parametrize("count", [10, 500])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_leading_directions_are_those_of_the_second_moment(count, energy):
    rows = text_rows(orthonormal(6, 1), count, noise=1e-3) + 0.5
    basis = second_moment(rows.split(7), count).leading(energy)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    shares = values.flip(0).cumsum(dim=0) / values.sum()
    k = min(count, D) if energy == 1 else int((shares < energy).sum()) + 1
    assert basis.shape == (k, D)
    torch.testing.assert_close(basis @ basis.T, torch.eye(k, dtype=torch.float64))
    expected = vectors.flip(1)[:, :k]
    torch.testing.assert_close(basis.T @ basis, expected @ expected.T, atol=1e-8, rtol=0)


def test_directions_of_rows_that_span_less_than_all():
    basis = second_moment(text_rows(orthonormal(3, 0), 400).split(100), 400).leading(1.0)
    assert len(basis) == 3
    cosines = torch.linalg.svdvals(basis @ orthonormal(3, 0).T)
    assert cosines.min() > 1 - 1e-10


# SEA


@pytest.mark.parametrize(
    "fields",
    [
        {"rescale": "none"},
        {"rescale": "token"},
        {"rescale": "none", "centered": True},
        {"rescale": "none", "feature_map": "tanh", "feature_space": "feature"},
        {"rescale": "none", "projections": "exchanged"},
        {"rescale": "none", "strength": 2.0},
    ],
    ids=str,
)
def test_texts_come_through_unchanged(tmp_path, fields):
    store = ActivationStore.from_tensors(tmp_path / "store", **planted())
    # under an elementwise map directions stay directions only along the axes
    basis = torch.eye(D, dtype=torch.float64)[:4] if "feature_map" in fields else orthonormal(4, 7)
    rows = text_rows(basis, 300)
    config = SEAConfig(retain_energy=1.0, **fields)
    model = get_peft_model(tiny_model(), config)
    retain = retained_mlp(tmp_path / "retain", rows)
    fit = fit_sea(model, store, retain=retain)
    for site in fit.layers:
        layer = model.get_submodule(f"base_model.model.{site.site}")
        assert site.retained_rank == 4 and site.change < 1e-7
        assert min(site.positive_rank, site.negative_rank) > 0
        h = rows.float()
        torch.testing.assert_close(layer.edit(h, "default"), h, atol=2e-6, rtol=1e-5)
        others = torch.randn(20, D)
        assert not torch.allclose(layer.edit(others, "default"), others, atol=1e-2)
    config = model.peft_config["default"]
    assert config.fitted_on["retain"] == {"texts": 1, "tokens": 300}
    assert json.loads(json.dumps(config.fitted_on)) == config.fitted_on


def test_without_a_retain_set_texts_change_and_it_is_told(tmp_path):
    store, rows = ActivationStore.from_tensors(tmp_path / "store", **planted()), text_rows(orthonormal(4, 7), 300)
    plain = get_peft_model(tiny_model(), SEAConfig())
    fit = fit_sea(plain, store)
    assert "retain" not in plain.peft_config["default"].fitted_on
    for site in fit.layers:
        layer = plain.get_submodule(f"base_model.model.{site.site}")
        h = store.neutral(site.layer).float()
        change = ((layer.edit(h, "default") - h).norm(dim=1) / h.norm(dim=1)).mean()
        assert site.retained_rank == 0 and site.change == pytest.approx(float(change), rel=1e-4)
        assert plain.peft_config["default"].fit_statistics[site.site]["change"] == site.change
        h = rows.float()
        assert ((layer.edit(h, "default") - h).norm(dim=1) / h.norm(dim=1)).mean() > 0.05


def test_the_change_is_that_of_the_retained_texts(tmp_path):
    store, rows = ActivationStore.from_tensors(tmp_path / "store", **planted()), text_rows(orthonormal(9, 7), 300)
    model = get_peft_model(tiny_model(), SEAConfig(retain_energy=0.5))
    for site in fit_sea(model, store, retain=retained_mlp(tmp_path / "retain", rows)).layers:
        layer, h = model.get_submodule(f"base_model.model.{site.site}"), rows.float()
        change = ((layer.edit(h, "default") - h).norm(dim=1) / h.norm(dim=1)).mean()
        assert 0.01 < site.change == pytest.approx(float(change), rel=1e-4)


def test_merged_weights_leave_texts_alone_too(tmp_path):
    store, rows = ActivationStore.from_tensors(tmp_path / "store", **planted()), text_rows(orthonormal(4, 7), 300)
    model = get_peft_model(tiny_model(), SEAConfig(retain_energy=1.0, rescale="none"))
    fit = fit_sea(model, store, retain=retained_mlp(tmp_path / "retain", rows))
    before = {s.site: tiny_model().get_submodule(s.site).weight for s in fit.layers}
    merged = model.merge_and_unload()
    for site, weight in before.items():
        change = merged.get_submodule(site).weight - weight
        assert change.norm() > 1e-3
        assert (orthonormal(4, 7).float() @ change).abs().max() < 1e-6


@pytest.mark.parametrize("fields", [{"projections": "positive"}, {"rescale": "average"}])
def test_edits_that_change_every_token_are_refused(tmp_path, fields):
    ((name, value),) = fields.items()
    store, rows = ActivationStore.from_tensors(tmp_path / "store", **planted()), text_rows(orthonormal(4, 7), 300)
    model = get_peft_model(tiny_model(), SEAConfig(**({"rescale": "none"} | fields)))
    with pytest.raises(
        ValueError, match=rf"{name}='{value}' .* leaves no token of a retain set as it is: take another"
    ):
        fit_sea(model, store, retain=retained_mlp(tmp_path / "retain", rows))
    assert model.peft_config["default"].rank_pattern == {}


def test_all_directions_cannot_be_retained(tmp_path):
    store = ActivationStore.from_tensors(tmp_path / "store", **planted())
    model = get_peft_model(tiny_model(), SEAConfig(retain_energy=1.0))
    retain = retained_mlp(tmp_path / "retain", torch.randn(300, D))
    with pytest.raises(ValueError, match=r"layer 0: the retain set spans all directions, .*: lower retain_energy"):
        fit_sea(model, store, retain=retain)
    assert not model.peft_config["default"].rank_pattern


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda p: ActivationStore.from_tensors(p, **planted(n=50)),
            "holds one row an answer, to retain are plain texts",
        ),
        (lambda p: retained_mlp(p, torch.randn(99, D)), "holds 99 tokens, too few .*: collect texts of at least 100"),
        (lambda p: retained_blocks(p, dict.fromkeys(LAYERS, torch.randn(200, D))), "holds the output of 'block'"),
        (lambda p: retained_mlp(p, torch.randn(200, D), fingerprint="f" * 16), "was collected from another model"),
        (lambda p: retained_mlp(p, torch.randn(200, D + 1)), "has hidden size 33"),
        (lambda p: p, "is no activation store"),
        (lambda p: [p], "a store must be an ActivationStore or its folder, got list"),
    ],
)
def test_retain_stores_that_do_not_suit(tmp_path, make, message):
    store = ActivationStore.from_tensors(tmp_path / "store", **planted())
    model = get_peft_model(tiny_model(), SEAConfig())
    with pytest.raises(ValueError, match=message) as caught:
        fit_sea(model, store, retain=make(tmp_path / "retain"))
    assert "\n" not in str(caught.value)
    assert not model.peft_config["default"].rank_pattern


@pytest.mark.parametrize("energy", [0, 1.5, 99])
def test_an_energy_that_is_none(energy):
    with pytest.raises(ValueError, match=r"retain_energy must be in \(0, 1\]"):
        SEAConfig(retain_energy=energy)


# HPR


def test_the_loss_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    logits, angles = torch.randn(2, 3, 2, 5, generator=generator, dtype=torch.float64)
    target, retained = torch.rand(3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator).double()
    found = hpr.loss(
        logits, angles, target, retained_logits=retained[0], retained_angles_rad=retained[1], retain_weight=0.7
    )
    for block in range(3):
        terms = [
            -functional.logsigmoid(logits[block, 0, i])
            - functional.logsigmoid(-logits[block, 1, i])
            - 0.7 * functional.logsigmoid(retained[0, block, i])
            + angles[block, 0, i] ** 2
            + (angles[block, 1, i] - target[block, i]) ** 2
            + 0.7 * retained[1, block, i] ** 2
            for i in range(5)
        ]
        assert float(found.total[block]) == pytest.approx(float(sum(terms)) / (2 * 5))
    none = hpr.loss(logits, angles, target)
    zero = hpr.loss(
        logits, angles, target, retained_logits=retained[0], retained_angles_rad=retained[1], retain_weight=0
    )
    assert torch.equal(none.total, zero.total)


def test_stacked_layers_give_what_the_layers_give_of_retained_tokens():
    layers = layers_of(adapted(init_weights=False))
    stacked = StackedHPR(layers, "default")
    activations, retained = torch.randn(5, 3, 2, D), torch.randn(7, 3, D)
    *of_pairs, logits, angles = stacked(activations, retained)
    torch.testing.assert_close(tuple(of_pairs), stacked(activations), rtol=0, atol=1e-6)
    for i, layer in enumerate(layers):
        expected = layer.probe_logits(retained[:, i], "default"), layer.angles(retained[:, i], "default")
        torch.testing.assert_close((logits[:, i], angles[:, i]), expected, rtol=0, atol=1e-6)


def retained_trainer(model, folder, store, retain, **changes):
    trainer = trainer_of(model, folder, store, **changes)
    return HPRTrainer(model, trainer.args, train_dataset=store, retain_dataset=retain)


def negative_texts(path):
    """Texts that the probe of the pairs alone takes for negative: they also have a direction of their own."""
    rows = {}
    for layer, pairs in planted_pairs(200, seed=3).items():
        own = functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(77 + layer)), dim=0)
        rows[layer] = pairs[:200] + 3 * own
    return retained_blocks(path, rows, lengths=[120, 80])


def share_touched(model, store):
    layers = layers_of(model)
    rows = (store.gather(store.text_tokens(), [i])[0] for i in LAYERS)
    return max(
        float((layer.probe_logits(h, "default") <= 0).float().mean()) for layer, h in zip(layers, rows, strict=True)
    )


def test_the_probe_learns_to_leave_texts_alone(tmp_path):
    store = write_store(tmp_path / "store", planted_pairs(600, shift=1.5))
    retain = negative_texts(tmp_path / "retain")
    options = {"learning_rate": 5e-3, "num_train_epochs": 4}
    plain, kept = adapted(), adapted()
    trainer_of(plain, tmp_path / "a", store, **options).train()
    trainer = retained_trainer(kept, tmp_path / "b", store, retain, **options)
    trainer.train()
    assert share_touched(plain, retain) > 0.3 and share_touched(kept, retain) < 0.01
    last = [entry for entry in trainer.state.log_history if "retain_touched" in entry][-1]
    assert last["retain_touched"] < 0.02 and last["probe_accuracy"] > 0.98
    fitted_on = kept.peft_config["default"].fitted_on
    assert fitted_on["retain"] == {"texts": 2, "tokens": 200, "weight": 1.0}
    assert "retain" not in plain.peft_config["default"].fitted_on


def test_a_weight_of_zero_is_the_paper(tmp_path):
    store, retain = write_store(tmp_path / "store"), negative_texts(tmp_path / "retain")
    models = [adapted(), adapted()]
    trainer_of(models[0], tmp_path / "a", store).train()
    retained_trainer(models[1], tmp_path / "b", store, retain, retain_weight=0.0).train()
    for one, other in zip(weights(models[0]).values(), weights(models[1]).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_which_tokens_are_drawn_follows_from_the_batch(tmp_path):
    store, retain = write_store(tmp_path / "store"), negative_texts(tmp_path / "retain")
    pairs = TokenPairs(store, LAYERS, retain, seed=3)
    batch = pairs.__getitems__([5, 1, 8])
    assert batch["retained"].shape == (3, 3, D)
    again = TokenPairs(store, LAYERS, retain, seed=3).__getitems__([5, 1, 8])
    assert torch.equal(batch["retained"], again["retained"])
    for other in (pairs.__getitems__([1, 5, 8]), TokenPairs(store, LAYERS, retain, 4).__getitems__([5, 1, 8])):
        assert not torch.equal(batch["retained"], other["retained"])
    drawn = torch.cat([pairs.__getitems__([i])["retained"][:, 0] for i in range(64)])
    held = retain.gather(retain.text_tokens(), [0])[0]
    assert all((held == row).all(dim=1).any() for row in drawn) and len(drawn.unique(dim=0)) > 40
    assert pairs[5].keys() == batch.keys()


def test_a_retain_set_needs_training_data_and_a_weight(tmp_path):
    retain = negative_texts(tmp_path / "retain")
    with pytest.raises(ValueError, match="retain_dataset needs a train_dataset"):
        HPRTrainer(adapted(), trainer_of(adapted(), tmp_path, None).args, retain_dataset=retain)
    with pytest.raises(ValueError, match="retain_weight must be a number of 0 or more and finite, got -1"):
        trainer_of(adapted(), tmp_path, write_store(tmp_path / "s"), retain_weight=-1)
