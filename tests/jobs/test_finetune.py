"""Retraining: zeros that stay, steps against SGD by hand, and runs that are cut off and go on."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from embedded import DIGITS, RESNET, VIT, copy_of, edit_config, tensors_of, write_tensors
from PIL import Image
from quick import slow

from snows_hf import finetune, inspect, load, prune, train
from snows_hf.data.images import drawn_labelled, open_images, pictures
from snows_hf.errors import ConfigError, DataError, LoadError, NumericsError, SnowsError
from snows_hf.hub.save import REPORT_FILE, read_report
from snows_hf.jobs.finetune import distillation, learning_rate
from snows_hf.runtime.files import work_folder
from snows_hf.settings import FinetuneConfig


QUICK = {"samples": 96, "epochs": 3, "batch_size": 32, "seed": 1}


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded ResNet under a 1:4 mask, with its own weights."""
    folder = tmp_path_factory.mktemp("mask") / "mask"
    prune(str(RESNET), "1:4", data=str(DIGITS), samples=8, mask="magnitude", update=False, output=folder)
    return folder


def retrained(mask: Path, output: Path, **settings: object) -> dict[str, torch.Tensor]:
    finetune(str(mask), str(DIGITS), output=output, **QUICK | settings)
    return tensors_of(output)


@pytest.mark.parametrize("teacher", [slow(None), str(RESNET)], ids=["labels", "teacher"])
def test_zeros_stay_and_accuracy_returns(mask: Path, tmp_path: Path, teacher: str | None) -> None:
    result = finetune(
        str(mask), str(DIGITS), output=tmp_path / "out", eval_data=str(DIGITS), teacher=teacher, flip=False,
        samples=400, epochs=3, batch_size=32, lr=0.02,
    )  # fmt: skip
    before, after = tensors_of(mask), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    pruned = [name for name, tensor in before.items() if tensor.ndim == 4 and (tensor == 0).float().mean() > 0.5]
    assert len(pruned) == 8
    for name in pruned:
        assert torch.equal(before[name] == 0, after[name] == 0)
        assert not torch.signbit(after[name][after[name] == 0]).any()
        assert not torch.equal(before[name], after[name])
    assert inspect(str(tmp_path / "out"))["pattern_ok"] is True
    made = result.report["finetune"]
    assert made["mask_unchanged"] is True
    assert made["before"]["top1"] < 30
    assert made["after"]["top1"] > 85
    assert made["losses"] == sorted(made["losses"], reverse=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    card = (tmp_path / "out/README.md").read_text()
    assert "No retraining" not in card
    assert f"**{made['after']['top1']:.2f}**" in card
    assert f"value: {made['after']['top1']:.4f}".rstrip("0") in card
    assert ("`resnet_digits` besides" in card) == (teacher is not None)
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert report["finetune"] == made
    assert str(tmp_path) not in json.dumps(report) + card
    assert load(str(tmp_path / "out")).config["snows"]["finetuned_epochs"] == 3


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_that_is_cut_off_goes_on_to_the_same_weights(mask: Path, tmp_path: Path, after: int) -> None:
    whole = retrained(mask, tmp_path / "whole")

    def cut(stage: str) -> None:
        if stage.startswith(f"Epoch {after}/3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrained(mask, tmp_path / "parts", on_stage=cut)
    assert not (tmp_path / "parts").exists()
    stages: list[str] = []
    parts = retrained(mask, tmp_path / "parts", on_stage=stages.append)
    assert f"Going on after epoch {after} of 3" in stages
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_seed_and_epoch_alone_decide_order_and_augmentation(mask: Path, tmp_path: Path) -> None:
    """At a vanishing learning rate losses differ by what the images went through alone."""

    def losses(name: str, ambient: int, **settings: int) -> list[float]:
        still = {"lr": 1e-20, "momentum": 0.0, "weight_decay": 0.0}
        with torch.random.fork_rng([]):
            torch.manual_seed(ambient)
            result = finetune(str(mask), str(DIGITS), output=tmp_path / name, **QUICK | still | settings)
        return list(result.report["finetune"]["losses"])

    first = losses("a", 0)
    assert len(set(first)) == 3
    assert losses("b", 1) == first
    assert not set(losses("c", 0, seed=2)) & set(first)


def test_an_unfinished_run_is_continued_by_its_own_command_alone(mask: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def cut(stage: str) -> None:
        if stage.startswith("Epoch 1/3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrained(mask, output, on_stage=cut)
    with pytest.raises(ConfigError, match=r"settings\.lr was 0\.003 and is 0\.0001.*--restart"):
        try:
            retrained(mask, output, lr=1e-4)
        except ConfigError as error:
            raise ConfigError(f"{error.message} {error.remedy}") from error
    for change in ({"teacher": str(RESNET)}, {"samples": 64}):
        with pytest.raises(ConfigError, match="this is another one"):
            retrained(mask, output, **change)
    with pytest.raises(ConfigError, match="model was"):
        retrained(write_tensors(copy_of(mask, tmp_path / "other"), shifted(mask)), output)
    stages: list[str] = []
    retrained(mask, output, lr=1e-4, restart=True, on_stage=stages.append)
    assert not any(stage.startswith("Going on") for stage in stages)


def test_a_damaged_state_is_made_again(mask: Path, tmp_path: Path) -> None:
    whole = retrained(mask, tmp_path / "whole", epochs=2)

    def cut(stage: str) -> None:
        if stage.startswith("Epoch 1/2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrained(mask, tmp_path / "out", epochs=2, on_stage=cut)
    (state,) = work_folder(tmp_path / "out").glob("epoch.*.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    again = retrained(mask, tmp_path / "out", epochs=2)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def shifted(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t + 1e-3 if name.endswith("bias") else t for name, t in tensors_of(folder).items()}


def test_steps_against_sgd_by_hand(mask: Path, tmp_path: Path) -> None:
    """Two epochs of one full batch without augmentation, so that the order of the images does not matter."""
    plain = {"samples": 40, "epochs": 2, "batch_size": 64, "crop": 0.0, "flip": False, "decay_every": 1, "lr": 0.01}
    got = retrained(mask, tmp_path / "out", **plain)
    checkpoint = load(str(mask))
    model = checkpoint.model.train()
    source, labels = drawn_labelled(open_images(str(DIGITS), "train"), 40, QUICK["seed"])
    pixels = checkpoint.preprocess(pictures(source, range(40)))
    zeros = {
        name: p.detach() == 0 for name, p in model.named_parameters() if p.ndim == 4 and (p == 0).float().mean() > 0.5
    }
    assert len(zeros) == 8
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for lr in (0.01, 0.001):
        loss = F.cross_entropy(model(pixels).logits, labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
                velocity[name] = 0.9 * velocity[name] + gradient + 5e-5 * parameter
                velocity[name][zeros.get(name, torch.zeros_like(parameter, dtype=torch.bool))] = 0
                parameter -= lr * velocity[name]
    moved = model.state_dict()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, moved[name], atol=1e-5, rtol=1e-4, msg=name)


def test_distillation_against_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    p, q = (theirs / 3).softmax(1), (ours / 3).softmax(1)
    torch.testing.assert_close(distillation(ours, theirs, 3.0), 9 * (p * (p / q).log()).sum(1).mean())
    assert float(distillation(ours, ours, 3.0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "epochs, every, decays", [(90, 0, {0: 0, 29: 0, 30: 1, 60: 2, 89: 2}), (5, 0, {1: 0, 2: 1, 4: 2}), (4, 1, {3: 3})]
)
def test_decay_as_in_the_paper(epochs: int, every: int, decays: dict[int, int]) -> None:
    config = FinetuneConfig(epochs=epochs, decay_every=every)
    for epoch, count in decays.items():
        assert learning_rate(config, epoch, epochs) == pytest.approx(3e-3 * 0.1**count)


def test_minutes_bound_the_epochs(mask: Path, tmp_path: Path) -> None:
    made = finetune(str(mask), str(DIGITS), output=tmp_path / "out", **QUICK | {"minutes": 1e-6}).report["finetune"]
    assert (made["epochs"], made["planned"]) == (1, 1)
    assert made["settings"]["epochs"] == 3


def test_half_precision_stays_half(mask: Path, tmp_path: Path) -> None:
    half = {n: t.half() if t.is_floating_point() else t for n, t in tensors_of(mask).items()}
    source = edit_config(write_tensors(copy_of(mask, tmp_path / "half"), half), dtype="float16")
    after = retrained(source, tmp_path / "out", epochs=1)
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in half.items()}
    for name, tensor in half.items():
        if tensor.ndim == 4:
            assert (after[name][tensor == 0] == 0).all()
    with pytest.raises(NumericsError, match="has become"):  # finite in float32, not in float16
        retrained(source, tmp_path / "overflow", epochs=1, samples=32, lr=1e10)
    assert not (tmp_path / "overflow").exists()


def pruned_at_initialisation(folder: Path) -> Path:
    train(str(RESNET), str(DIGITS), "2:4", output=folder, samples=60, epochs=1, mask="magnitude")
    return folder


def trained_dense(folder: Path) -> Path:
    train("resnet20_cifar", str(DIGITS), output=folder, samples=20, epochs=1)
    return folder


def dense(folder: Path) -> Path:
    """With a zero here and there, as every half-precision checkpoint has, that nobody pruned."""
    tensors = tensors_of(RESNET)
    for tensor in tensors.values():
        if tensor.ndim == 4:
            tensor.view(-1)[:3] = 0
    return write_tensors(copy_of(RESNET, folder), tensors)


def pruned_by_others(folder: Path) -> Path:
    """Zeros, and nothing that says where they come from."""
    tensors = tensors_of(RESNET)
    for tensor in tensors.values():
        if tensor.ndim == 4 and tensor.shape[1] % 4 == 0:
            tensor[:, ::2] = 0
    return write_tensors(copy_of(RESNET, folder), tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, pattern, claimed", [(pruned_at_initialisation, "2:4", "2:4"), (trained_dense, None, None),
                               (dense, None, None), (pruned_by_others, "2:4", None)]
)  # fmt: skip
def test_any_checkpoint_is_retrained(make, pattern: str | None, claimed: str | None, tmp_path: Path) -> None:
    """Once and once more; zeros of pruning stay, and nothing claims what is not so."""
    source = make(tmp_path / "source")
    known = source / REPORT_FILE
    earlier = json.loads(known.read_text()) if known.is_file() else {}
    zeros = {n: t == 0 for n, t in tensors_of(source).items() if t.ndim == 4 and (t == 0).float().mean() > 0.1}
    assert bool(zeros) == (pattern is not None)
    before = source
    for name in ("once", "twice"):
        stages: list[str] = []
        options = {"eval_data": str(DIGITS), "on_stage": stages.append}
        result = finetune(str(before), str(DIGITS), output=tmp_path / name, **QUICK | {"epochs": 1} | options)
        made, after = result.report["finetune"], tensors_of(tmp_path / name)
        held = sum(int(zero.sum()) for zero in zeros.values())
        assert made["zeros"] == held and made["mask_unchanged"] is True
        assert (f"Holding {held} zeros" if zeros else "The model is dense: no weight is held at zero") in stages
        for key, zero in zeros.items():
            assert torch.equal(after[key] == 0, zero)
        if not zeros:
            assert all((t == 0).sum() == 0 for t in after.values() if t.ndim == 4)
        report = json.loads((tmp_path / name / REPORT_FILE).read_text())
        assert report | {"name": earlier.get("name")} == report | earlier | {"name": earlier.get("name")}
        snows = load(str(tmp_path / name)).config["snows"]
        assert (snows.get("pattern"), snows["finetuned_epochs"]) == (claimed, ("once", "twice").index(name) + 1)
        assert (inspect(str(tmp_path / name))["pattern"], inspect(str(tmp_path / name))["pattern_ok"]) == (
            pattern, pattern is not None,
        )  # fmt: skip
        card = (tmp_path / name / "README.md").read_text()
        assert f"**{made['after']['top1']:.2f}**" in card
        assert f"value: {made['after']['top1']:.4f}".rstrip("0") in card
        assert card.count("weights were retrained for") == snows["finetuned_epochs"]
        assert ("No zero was moved" in card) == bool(zeros) == ("No zero was held" not in card)
        assert ("trained from random weights" in card) == (make is trained_dense)
        assert ("pruned at initialisation" in card) == (make is pruned_at_initialisation)
        assert "pruned one-shot" not in card
        with pytest.raises(LoadError, match=r"is what `snows-hf (train|finetune)` wrote.*expected what"):
            read_report(tmp_path / name)
        before = tmp_path / name


def test_a_claim_without_a_zero_is_not_handed_on(tmp_path: Path) -> None:
    source = edit_config(copy_of(RESNET, tmp_path / "m"), snows={"pattern": "2:4", "sparsity": 0.5, "weights": 9})
    retrained(source, tmp_path / "out", epochs=1)
    assert load(str(tmp_path / "out")).config["snows"].keys() == {"version", "finetuned_epochs"}


@pytest.mark.parametrize("damage", [{"collapse": 1}, {"collapse": {"layers": {}, "connected": True}},
                                    {"finetune": {}, "pattern": None}])  # fmt: skip
def test_damaged_reports_of_others_are_refused_at_once(damage: dict, tmp_path: Path) -> None:
    source = copy_of(RESNET, tmp_path / "m")
    (source / REPORT_FILE).write_text(json.dumps(damage))
    with pytest.raises(LoadError, match="not a report that this version"):
        retrained(source, tmp_path / "out")


def test_bad_requests(mask: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ConfigError, match="Unknown setting 'learning_rate'"):
        retrained(mask, output, learning_rate=1)
    for wrong in (
        {"epochs": 0},
        {"lr": 0},
        {"lr": math.inf},
        {"minutes": math.inf},
        {"momentum": 1},
        {"crop": -1},
        {"samples": 1},
    ):
        with pytest.raises(ConfigError, match="expected"):
            retrained(mask, output, **wrong)
    with pytest.raises(DataError, match="same split"):
        retrained(mask, output, eval_data=str(DIGITS), eval_split="train")
    with pytest.raises(ConfigError, match="another way"):
        retrained(mask, output, teacher=str(VIT))
    with pytest.raises(SnowsError, match="became"):
        retrained(mask, output, lr=1e29)
    broken = copy_of(mask, tmp_path / "broken")
    (broken / REPORT_FILE).write_text("{}")
    with pytest.raises(LoadError, match="not a report"):
        retrained(broken, output)
    unlabelled = tmp_path / "unlabelled/train"
    unlabelled.mkdir(parents=True)
    Image.new("L", (8, 8)).save(unlabelled / "a.png")
    with pytest.raises(DataError, match="no labels"):
        finetune(str(mask), str(unlabelled.parent), output=output)
    assert not output.exists()
    output.mkdir()
    (output / "file").touch()
    with pytest.raises(SnowsError, match="not empty"):
        retrained(mask, output)
