"""Allocation by sensitivity: what is measured, what is chosen, and that each layer's own pattern is honoured."""

import itertools
from dataclasses import replace

import pytest
import torch
from masks.networks import convolutions, evidence, linears

from snows_hf.errors import ConfigError, PatternError
from snows_hf.masks.allocation import Sensitivity, allocate, interpolated, layer_sensitivities
from snows_hf.masks.choose import choose
from snows_hf.patterns import NM, PerLayer, Unstructured, parse_candidates
from snows_hf.patterns.plan import by_sensitivity, candidates_of
from snows_hf.settings import PruneConfig


FLOPS = {f"layers.{i}": 0 for i in range(4)}


def config(pattern: str, **changes: object) -> PruneConfig:
    return PruneConfig(pattern).updated(**changes)


def table(*layers: list[tuple[object, float]], weights: int = 100, flops: tuple[int, ...] = ()) -> list[Sensitivity]:
    """Layers of so many weights, each a list of (pattern, loss), the sparsest first."""
    flops = flops or (weights,) * len(layers)
    return [
        Sensitivity(
            f"layer{i}",
            (f"layer{i}.weight",),
            pattern,
            weights,
            round(weights * (1 - pattern.sparsity)),
            flops[i],
            loss,
        )
        for i, rows in enumerate(layers)
        for pattern, loss in rows
    ]


class TestMeasured:
    def test_without_repair_it_is_the_error_of_the_network_with_one_layer_masked(self) -> None:
        model = convolutions()
        given = evidence(model, "2:4", "magnitude", repair_steps=0)
        rows = layer_sensitivities(given, [NM(1, 4), None, NM(2, 4)], FLOPS | {"layers.0": 7})
        assert [(row.layer, str(row.pattern)) for row in rows] == [
            (f"layers.{i}", pattern) for i in range(4) for pattern in ("1:4", "2:4")
        ]
        assert [rows[0].flops, rows[2].flops] == [7, 0]
        judged = given.images[3:]
        with torch.no_grad():
            target = model(judged)
            for row in rows:
                weight = model.get_parameter(f"{row.layer}.weight")
                dense = weight.clone()
                weight.mul_(row.pattern.mask(dense.abs()))
                assert row.kept == int((weight != 0).sum()) and row.weights == weight.numel()
                expected = (model(judged) - target).square().mean() / target.var()
                weight.copy_(dense)
                assert row.loss == pytest.approx(float(expected), rel=1e-9)

    def test_small_batches_measure_the_same(self) -> None:
        whole, parts = (
            layer_sensitivities(
                evidence(convolutions(), "2:4", "magnitude", batch_size=size, repair_steps=0), [NM(2, 4)], FLOPS
            )
            for size in (12, 2)
        )
        assert [row.loss for row in parts] == pytest.approx([row.loss for row in whole], rel=1e-12)

    def test_repair_lowers_what_it_measures_and_leaves_the_network_as_it_was(self) -> None:
        model = linears()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        given = evidence(model, "2:4", "magnitude", count=60, weighting="relative")
        masked, repaired = (
            layer_sensitivities(replace(given, config=given.config.updated(repair_steps=steps)), [NM(1, 4)], FLOPS)
            for steps in (0, 2)
        )
        assert sum(row.loss for row in repaired) < sum(row.loss for row in masked)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_a_criterions_own_update_counts(self) -> None:
        given = evidence(linears(), "2:4", "obc", count=60, repair_steps=0)
        magnitude = replace(given, config=given.config.updated(mask="magnitude"))
        own, plain = (layer_sensitivities(each, [NM(1, 4)], FLOPS) for each in (given, magnitude))
        assert sum(row.loss for row in own) < sum(row.loss for row in plain)

    def test_one_image_is_too_few(self) -> None:
        given = evidence(linears(), "2:4", "magnitude", count=1)
        with pytest.raises(ConfigError, match="two images"):
            layer_sensitivities(given, [NM(2, 4)], FLOPS)


class TestChosen:
    ROWS = ([(NM(1, 4), 9.0), (NM(2, 4), 4.0)], [(NM(1, 4), 1.0), (NM(2, 4), 0.9)], [(NM(1, 4), 5.0), (NM(2, 4), 0.1)])

    @pytest.mark.parametrize("sparsity", [0.2, 0.4, 0.5, 0.6, 0.7])
    def test_n_m_of_a_set_against_all_combinations(self, sparsity: float) -> None:
        pattern = allocate(table(*self.ROWS), config("1:4,2:4,dense", sparsity=sparsity))
        options = [[*rows, (None, 0.0)] for rows in self.ROWS]

        def zeros(choice: tuple) -> float:
            return sum(own.sparsity if own else 0.0 for own, _ in choice) / 3

        best = min(sum(loss for _, loss in c) for c in itertools.product(*options) if zeros(c) >= sparsity - 1e-9)
        found = tuple(
            next(option for option in options[i] if option[0] == pattern.of(f"layer{i}.weight")) for i in range(3)
        )
        assert zeros(found) >= sparsity - 1e-9
        assert sum(loss for _, loss in found) == pytest.approx(best)
        assert str(pattern) == "1:4,2:4,dense"

    def test_without_dense_in_the_set_no_layer_stays_so(self) -> None:
        pattern = allocate(table(*self.ROWS), config("1:4,2:4", sparsity=0.1))
        assert set(pattern.patterns.values()) == {NM(2, 4)}

    def test_a_budget_of_operations_spends_where_they_are_few(self) -> None:
        same = [(NM(1, 4), 1.0)]
        pattern = allocate(table(same, same, flops=(900, 100)), config("1:4,dense", sparsity=0.5, budget="flops"))
        assert pattern.patterns == {"layer0.weight": NM(1, 4), "layer1.weight": None}

    @pytest.mark.parametrize("flops", [(900, 100, 500), (0, 0, 500), (0, 0, 0)])
    def test_sparsities_under_a_budget_of_operations(self, flops: tuple[int, ...]) -> None:
        given = config("0.8", allocation="sensitivity", budget="flops")
        layers = [[(p, 1 / (1 - p.sparsity)) for p in candidates_of(given)]] * 3
        pattern = allocate(table(*layers, weights=5000, flops=flops), given)
        own = [pattern.of(f"layer{i}.weight") for i in range(3)]
        spent = sum(n * (1 - p.sparsity if p else 1.0) for n, p in zip(flops, own, strict=True))
        assert spent <= 0.2 * sum(flops) + 1e-9 and spent == pytest.approx(0.2 * sum(flops), rel=0.02)
        assert all(p is None for n, p in zip(flops, own, strict=True) if n == 0)

    def test_a_sparsity_that_no_candidate_reaches_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="sparser patterns"):
            allocate(table(*self.ROWS), config("1:4,2:4", sparsity=0.8))

    def test_sparsities_reach_the_total_to_the_weight(self) -> None:
        grid = candidates_of(config("0.8", allocation="sensitivity"))
        layers = [[(p, a / (1 - p.sparsity) ** b) for p in grid] for a, b in ((1.0, 1.0), (3.0, 1.0), (0.2, 2.0))]
        pattern = allocate(table(*layers, weights=9973), config("0.8", allocation="sensitivity"))
        counts = pattern.zeros({name: torch.empty(9973) for name in pattern.patterns})
        assert sum(counts.values()) == round(0.8 * 3 * 9973)

    def test_sparsities_of_power_laws_come_near_the_true_optimum(self) -> None:
        """Of losses a/d with Σd fixed, Lagrange's multiplier gives d ∝ √a."""
        grid = candidates_of(config("0.8", allocation="sensitivity"))
        factors = (1.0, 4.0, 2.0)
        layers = [[(p, a / (1 - p.sparsity)) for p in grid] for a in factors]
        pattern = allocate(table(*layers, weights=10_000), config("0.8", allocation="sensitivity"))
        found = [1 - pattern.of(f"layer{i}.weight").sparsity for i in range(3)]
        whole = sum(a**0.5 for a in factors)
        assert found == pytest.approx([0.6 * a**0.5 / whole for a in factors], rel=0.03)

    @pytest.mark.parametrize("sparsity", ["0.01", "0.3", "0.5", "0.9", "0.99", "0.999"])
    def test_every_sparsity_and_tiny_layers_too(self, sparsity: str) -> None:
        given = config(sparsity, allocation="sensitivity")
        grid = candidates_of(given)
        assert [1 - p.sparsity for p in grid] == sorted(1 - p.sparsity for p in grid)
        losses = [(p, 1 / (1 - p.sparsity)) for p in grid]
        rows = table(losses, losses, weights=30_000) + [
            replace(row, layer="tiny", parameters=("tiny.weight",)) for row in table(losses, weights=9)
        ]
        pattern = allocate(rows, given)
        sizes = {"layer0.weight": 30_000, "layer1.weight": 30_000, "tiny.weight": 9}
        own = {name: torch.empty(size) for name, size in sizes.items() if pattern.of(name)}
        assert sum(pattern.zeros(own).values()) == round(float(sparsity) * sum(sizes.values()))

    def test_a_loss_that_falls_with_sparsity_by_chance_is_no_reason_to_keep_less(self) -> None:
        grid = candidates_of(config("0.8", allocation="sensitivity"))
        noisy = [(p, 1.0 if i == 3 else 1e-3) for i, p in enumerate(grid)]
        steep = [(p, 1 / (1 - p.sparsity)) for p in grid]
        pattern = allocate(table(noisy, steep, weights=1000), config("0.8", allocation="sensitivity"))
        assert pattern.of("layer0.weight").sparsity == pytest.approx(0.95, abs=0.01)

    def test_interpolated_losses_never_grow_with_the_weights_kept(self) -> None:
        """At measured points the least loss of as many weights or fewer; measured to grow twice, by chance."""
        measured = [(0.9, 4.0), (0.8, 1.0), (0.6, 3.0), (0.4, 0.5), (0.2, 2.0)]
        rows = interpolated(table([(Unstructured(s), loss) for s, loss in measured], weights=10_000))
        losses = [row.loss for row in rows]
        assert losses == sorted(losses, reverse=True)
        at = {row.kept: row.loss for row in rows}
        assert [at[1000], at[8000]] == pytest.approx([4.0, 0.5])
        between = [loss for kept, loss in at.items() if 2010 <= kept <= 3990]
        assert between and between == pytest.approx([1.0] * len(between))
        assert all(loss == pytest.approx(0.5) for kept, loss in at.items() if kept >= 6000)


class TestSettings:
    @pytest.mark.parametrize(
        "given, words",
        [
            ({"pattern": "1:4,2:4"}, "Add --sparsity"),
            ({"pattern": "1:4,0.5", "sparsity": 0.6}, "may hold N:M patterns"),
            ({"pattern": "1:4,2:4", "sparsity": 0.6, "allocation": "uniform"}, "takes one pattern"),
            ({"pattern": "2:4", "sparsity": 0.6}, "goes with a set"),
            ({"pattern": "2:4", "allocation": "sensitivity"}, "nothing to choose"),
            ({"pattern": "0.8", "budget": "flops"}, "goes with --allocation sensitivity"),
            ({"pattern": "0.8", "allocation": "sensitivity", "mask": "m.safetensors"}, "mask file has decided"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, given: dict[str, object], words: str) -> None:
        pattern = str(given.pop("pattern"))
        with pytest.raises(ConfigError, match=words):
            by_sensitivity(config(pattern, **given))

    def test_what_does(self) -> None:
        assert not by_sensitivity(config("2:4"))
        assert not by_sensitivity(config("0.8", allocation="uniform"))
        assert by_sensitivity(config("0.8", allocation="sensitivity"))
        assert by_sensitivity(config("1:4,2:4,dense", sparsity=0.6))

    def test_sets(self) -> None:
        assert parse_candidates("1:4, 2:4,dense") == [NM(1, 4), NM(2, 4), None]
        assert parse_candidates("0.8") == [Unstructured(0.8)]
        for bad in ("dense", "1:4,,2:4", "1:4,sparse"):
            with pytest.raises(PatternError):
                parse_candidates(bad)


@pytest.mark.parametrize(
    "mask", ["magnitude", "random", "wanda", "sparsegpt", "obc", "alps", "snip", "synflow", "hp-kstep"]
)
def test_every_criterion_honours_each_layers_own_pattern(mask: str) -> None:
    patterns = {"layers.0.weight": NM(1, 4), "layers.1.weight": Unstructured(0.7, "layer"), "layers.2.weight": None}
    given = replace(evidence(convolutions(), "2:4", mask), pattern=PerLayer(patterns, "mixed"))
    masks = choose(given).masks
    assert masks.keys() == {"layers.0.weight", "layers.1.weight"}
    assert NM(1, 4).holds(masks["layers.0.weight"])
    assert int((~masks["layers.1.weight"]).sum()) == round(0.7 * masks["layers.1.weight"].numel())
