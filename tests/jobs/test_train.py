"""Pruning at initialisation: collapse against walks through the graph, warm-up and training against plain torch."""

import itertools
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from embedded import DIGITS, RESNET, VIT, copy_of
from huggingface_hub import ModelCard
from masks.networks import convolutions, linears
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from snows_hf import inspect, train
from snows_hf.adapters import Group, Operation, build_chain, register
from snows_hf.adapters.cifar_resnet import CifarResNet
from snows_hf.errors import ConfigError, DataError, LoadError, NumericsError, PatternError
from snows_hf.hub.create import create
from snows_hf.hub.load import load
from snows_hf.hub.save import save_checkpoint
from snows_hf.jobs.train import factor, fit, warm_up
from snows_hf.masks.collapse import CUT, EMPTY, find_collapse
from snows_hf.runtime.run import Run
from snows_hf.settings import TrainConfig


class Plain(nn.Module):
    """Convolution, batch norm, ReLU, four times, without a way around; weights that are negative on average.

    What a ReLU lets through is never negative, so the sums of the next convolution are all far below zero, and before
    the statistics know their mean every ReLU is shut.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes = self.num_features = num_classes
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 12, 12, 3, padding=1, bias=False) for i in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(4))
        self.linear = nn.Linear(12, num_classes)
        with torch.no_grad():
            for conv in self.convs[1:]:
                conv.weight.sub_(0.05)

    def part(self, i: int, x: Tensor) -> Tensor:
        x = F.relu(self.norms[i](self.convs[i](x)))
        return F.avg_pool2d(x, 2) if i < 2 else x

    def forward(self, x: Tensor) -> Tensor:
        for i in range(4):
            x = self.part(i, x)
        return self.linear(x.mean((2, 3)))


@register(Plain, family="plain")
def plain(model: Plain) -> list[Operation]:
    parts = [
        Operation(
            f"convs.{i}",
            lambda state, i=i: (model.part(i, state[0]),),
            Group(f"convs.{i}", (f"convs.{i}.weight",), "conv"),
        )
        for i in range(4)
    ]
    return [*parts, Operation("logits", lambda state: (model.linear(state[0].mean((2, 3))),))]


default_cfgs = generate_default_cfgs(
    {"plain_test": {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "classifier": "linear"}}
)


@register_model
def plain_test(pretrained: bool = False, **kwargs: object) -> nn.Module:
    return build_model_with_cfg(Plain, "plain_test", pretrained, kwargs_filter=("img_size",), **kwargs)


def on_paths(masks: list[Tensor]) -> list[bool]:
    """Of a chain of matrices (out, in): whether any of its weights lies on a path from first input to last output."""
    edges = [{(o, i) for o, i in mask.nonzero().tolist()} for mask in masks]
    paths = [
        path
        for path in itertools.product(*(range(n) for n in [masks[0].shape[1], *(mask.shape[0] for mask in masks)]))
        if all((path[k + 1], path[k]) in edge for k, edge in enumerate(edges))
    ]
    return [bool(paths)] * len(masks)


class TestCollapse:
    @pytest.mark.parametrize("seed", range(30))
    def test_against_every_path_through_a_chain(self, seed: int) -> None:
        chain = build_chain(linears())
        generator = torch.Generator().manual_seed(seed)
        masks = {
            name: torch.rand(chain.weight(name).shape, generator=generator) < (0.1, 0.2, 0.4)[seed % 3]
            for name in ("layers.0.weight", "layers.1.weight", "layers.2.weight")
        }
        cut, connected = find_collapse(chain, masks, torch.zeros(1, 4, dtype=torch.float64))
        expected = on_paths(list(masks.values()))
        assert connected == expected[0]
        # Biases are no path from the images, yet a layer behind a cut may still feed the logits through them.
        assert all(name in cut for name, mask in masks.items() if not mask.any())
        assert {name for name, reason in cut.items() if reason == EMPTY} == {
            name for name, mask in masks.items() if not mask.any()
        }
        if connected:
            assert not cut

    def test_weights_that_lead_nowhere(self) -> None:
        chain = build_chain(linears())
        masks = {name: torch.zeros_like(chain.weight(name), dtype=torch.bool) for name in ("layers.0.weight",)}
        masks["layers.0.weight"][2] = True  # unit 2 alone is fed …
        masks["layers.1.weight"] = torch.ones(4, 8, dtype=torch.bool)
        masks["layers.1.weight"][:, 2] = False  # … and nobody reads it
        cut, connected = find_collapse(chain, masks, torch.zeros(1, 4, dtype=torch.float64))
        assert cut == {"layers.0.weight": CUT, "layers.1.weight": CUT} and not connected

    def test_residual_branches_collapse_alone(self) -> None:
        model = CifarResNet(depth=8)
        chain = build_chain(model)
        masks = {
            name: torch.ones_like(chain.weight(name), dtype=torch.bool)
            for _, g in chain.groups()
            for name in g.parameters
        }
        assert find_collapse(chain, masks, torch.zeros(1, 3, 32, 32)) == ({}, True)
        masks["layer2.0.conv1.weight"][:] = False
        cut, connected = find_collapse(chain, masks, torch.zeros(1, 3, 32, 32))
        assert cut == {"layer2.0.conv1.weight": EMPTY, "layer2.0.conv2.weight": CUT} and connected

    def test_norms_that_begin_at_zero_are_no_collapse(self) -> None:
        model = CifarResNet(depth=8)
        nn.init.zeros_(model.layer1[0].bn2.weight)
        chain = build_chain(model)
        masks = {"layer1.0.conv1.weight": torch.ones(16, 16, 3, 3, dtype=torch.bool)}
        assert find_collapse(chain, masks, torch.zeros(1, 3, 32, 32)) == ({}, True)


class TestWarmUp:
    def test_statistics_are_the_average_over_batches_and_nothing_else_moves(self) -> None:
        torch.manual_seed(0)
        model = CifarResNet(depth=8).eval()
        weights = {name: p.clone() for name, p in model.named_parameters()}
        batches = torch.randn(12, 3, 32, 32).split(4)
        assert warm_up(model, batches, torch.device("cpu"))
        with torch.no_grad():
            outputs = [model.conv1(batch) for batch in batches]
        torch.testing.assert_close(model.bn1.running_mean, torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0))
        variances = torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0)
        torch.testing.assert_close(model.bn1.running_var, variances)
        assert not model.training and not model.bn1.training and model.bn1.momentum == 0.1
        assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())

    def test_a_network_without_batch_norm(self) -> None:
        assert not warm_up(convolutions(), (), torch.device("cpu"))

    def test_it_prevents_layer_collapse(self) -> None:
        """Without statistics every ReLU of Plain is shut, no gradient comes through, and SNIP takes whole layers."""
        quick = {"mask": "snip", "criterion_samples": 128, "samples": 1000, "augment": False}
        quick |= {"epochs": 5, "batch_size": 50, "lr": 0.2}
        cold, warm = (
            train("plain_test", str(DIGITS), "0.7", warm_up_bn=n, eval_data=str(DIGITS), **quick).report
            for n in (0, 4)
        )
        assert not cold["collapse"]["connected"]
        assert EMPTY in cold["collapse"]["layers"].values()
        assert warm["collapse"] == {"layers": {}, "connected": True}
        assert warm["accuracy"]["top1"] > 50 > 15 > cold["accuracy"]["top1"]


class TestFit:
    def test_one_step_is_plain_sgd_on_the_kept_weights(self) -> None:
        torch.manual_seed(0)
        model, twin = CifarResNet(depth=8), CifarResNet(depth=8)
        twin.load_state_dict(model.state_dict())
        x, y = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 5])
        masks = {"layer1.0.conv1.weight": torch.rand(16, 16, 3, 3) < 0.3}
        config = TrainConfig(epochs=1, batch_size=6, augment=False, lr=0.1, weight_decay=0.01)
        losses = fit(Run(), model, x, y, masks, config)
        weight = twin.layer1[0].conv1.weight
        weight.data *= masks["layer1.0.conv1.weight"]
        loss = F.cross_entropy(twin.train()(x), y)
        loss.backward()
        assert losses == [pytest.approx(loss.item(), rel=1e-5)]
        for (name, after), before in zip(model.named_parameters(), twin.parameters(), strict=True):
            kept = masks.get(name, torch.ones_like(before, dtype=torch.bool))
            expected = before - 0.1 * (before.grad + 0.01 * before)
            torch.testing.assert_close(after, torch.where(kept, expected, 0.0), rtol=1e-4, atol=1e-6)
        assert not model.training

    def test_zeros_stay_and_a_seed_means_the_same_weights(self) -> None:
        torch.manual_seed(0)
        start = CifarResNet(depth=8).state_dict()
        x, y = torch.randn(20, 3, 32, 32), torch.randint(10, (20,))
        masks = {"layer3.0.conv2.weight": torch.rand(64, 64, 3, 3) < 0.1}
        found = []
        for _ in range(2):
            torch.rand(1)  # the caller's own generator neither matters nor is touched
            state = torch.random.get_rng_state()
            model = CifarResNet(depth=8)
            model.load_state_dict(start)
            torch.random.set_rng_state(state)
            fit(Run(), model, x, y, masks, TrainConfig(epochs=2, batch_size=8, seed=3))
            assert torch.equal(torch.random.get_rng_state(), state)
            weight = model.layer3[0].conv2.weight
            assert torch.equal(weight != 0, masks["layer3.0.conv2.weight"])
            found.append(weight)
        assert torch.equal(*found)

    def test_a_loss_that_is_no_number(self) -> None:
        x, y = torch.full((4, 3, 32, 32), float("inf")), torch.zeros(4, dtype=torch.long)
        with pytest.raises(NumericsError, match=r"epoch 1\..*Lower --lr"):
            fit(Run(), CifarResNet(depth=8), x, y, {}, TrainConfig(epochs=1))

    def test_schedules(self) -> None:
        assert [round(factor(step, 4, "cosine"), 6) for step in range(5)] == [1, 0.853553, 0.5, 0.146447, 0]
        assert [factor(step, 4, "step") for step in range(4)] == pytest.approx([1, 1, 0.1, 0.01])


class TestCreate:
    def test_a_seed_means_the_same_weights_and_the_callers_generator_is_left_alone(self) -> None:
        state = torch.random.get_rng_state()
        one, same, other = (create("resnet20_cifar", None, seed).model.state_dict() for seed in (0, 0, 1))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not torch.equal(one["conv1.weight"], other["conv1.weight"])

    def test_an_architecture_has_an_output_for_each_class_of_the_data(self) -> None:
        checkpoint = create("resnet20_cifar", ["a", "b", "c"], 0)
        assert checkpoint.model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
        assert checkpoint.class_names == ("a", "b", "c")

    def test_of_a_folder_only_the_configuration_is_read(self, tmp_path: Path) -> None:
        folder = copy_of(VIT, tmp_path / "vit", without=("model.safetensors",))
        made, trained = create(str(folder), None, 0).model, AutoModelForImageClassification.from_pretrained(VIT)
        assert type(made) is type(trained)
        shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (made, trained)]
        assert shapes[0] == shapes[1]
        weights = [model.get_parameter("classifier.weight") for model in (made, trained)]
        assert not torch.equal(*weights)

    @pytest.mark.parametrize("source", [VIT, "timm"])
    def test_a_folder_takes_the_names_of_as_many_classes_of_the_data(self, source: object, tmp_path: Path) -> None:
        if source == "timm":
            train("resnet20_cifar", str(DIGITS), output=tmp_path / "timm", samples=2, epochs=1)
            source = tmp_path / "timm"
        names = tuple("abcdefghij")
        made = create(str(source), names, 0)
        save_checkpoint(made, tmp_path, {}, {})
        assert made.class_names == load(str(tmp_path)).class_names == names
        assert create(str(source), names[:3], 0).class_names == tuple("0123456789")

    @pytest.mark.parametrize("source", ["no_such_architecture", "./no/such/folder"])
    def test_neither(self, source: str) -> None:
        with pytest.raises(LoadError):
            create(source, None, 0)


class TestJob:
    def test_a_checkpoint_that_the_library_itself_loads(self, tmp_path: Path) -> None:
        quick = {"samples": 100, "epochs": 1, "mask": "synflow", "warm_up_bn": 1, "criterion_samples": 20}
        result = train(str(RESNET), str(DIGITS), "2:4", output=tmp_path / "out", eval_data=str(DIGITS), **quick)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        for name, tensor in result.model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name])
        found = inspect(str(tmp_path / "out"))
        assert found["pattern"] == "2:4" and found["pattern_ok"]
        card = (tmp_path / "out" / "README.md").read_text()
        measured = {m.metric_name: m for m in ModelCard.load(tmp_path / "out" / "README.md").data.eval_results}
        assert measured.keys() == {"top-1 accuracy (%)", "top-5 accuracy (%)"}
        top1 = measured["top-1 accuracy (%)"]
        assert top1.metric_value == pytest.approx(result.report["accuracy"]["top1"], abs=1e-4)
        assert (top1.dataset_name, top1.dataset_split) == (DIGITS.name, "test")
        assert "pruned at initialisation to **2:4**" in card and "warmed up on 1 batches" in card
        assert f"{result.report['accuracy']['top1']:.2f} %" in card

    def test_an_architecture_of_timm(self, tmp_path: Path) -> None:
        quick = {"samples": 16, "epochs": 1, "criterion_samples": 8}
        result = train("resnet20_cifar", str(DIGITS), "0.9", output=tmp_path / "out", **quick)
        loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
        assert all(
            torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in result.model.state_dict().items()
        )
        assert inspect(str(tmp_path / "out"))["pattern_ok"]
        assert result.report["sparsity"] == pytest.approx(0.9, abs=1e-4)

    def test_dense(self) -> None:
        report = train(str(RESNET), str(DIGITS), samples=8, epochs=0).report
        assert (report["pattern"], report["sparsity"], report["layers"]) == (None, 0.0, [])

    def test_a_cap_keeps_every_layer(self) -> None:
        given = {"samples": 8, "epochs": 0, "mask": "random"}
        report = train(str(RESNET), str(DIGITS), "0.97", layer_cap=0.98, **given).report
        assert max(layer["sparsity"] for layer in report["layers"]) < 0.981

    @pytest.mark.parametrize(
        "settings, kind, words",
        [
            ({"layer_cap": 0.5}, PatternError, "Layer cap 0.5"),
            ({"schedule": "linear"}, ConfigError, "'cosine' or 'step'"),
            ({"rate": 1}, ConfigError, "Unknown setting 'rate'"),
            ({"samples": 1}, ConfigError, "has one image"),
            ({"eval_data": str(DIGITS), "eval_split": "train"}, DataError, "use the same split"),
            ({"lr": 1e30, "samples": 40, "epochs": 3, "batch_size": 8}, NumericsError, "Lower --lr"),
        ],
    )
    def test_what_cannot_be_leaves_nothing_behind(self, settings, kind, words, tmp_path: Path) -> None:
        with pytest.raises(kind, match=words):
            train(str(RESNET), str(DIGITS), "0.8", output=tmp_path / "out", **settings)
        assert not list(tmp_path.iterdir())
