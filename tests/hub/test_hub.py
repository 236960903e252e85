"""Pull and push through the command line, with the real clients, against the Hub of server.py. Nothing is mocked.

Each command is a process (warm.py). What goes wrong is told in scenarios, each with a Hub and a home of its own.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow.parquet
import pytest
import timm
import warm
from embedded import DIGITS, NO_HUB, VIT, copy_of
from huggingface_hub import ModelCard, snapshot_download
from PIL import Image
from server import READER, WRITER, Hub, Repository

from snows_hf import evaluate, push
from snows_hf.errors import LoadError


QUICK = ("--pattern", "2:4", "--data", "me/digits", "--samples", 32, "--k", 0, "--mask", "sparsegpt")
NO_REPORT = """
from importlib import import_module
from snows_hf.cli import main
import_module("snows_hf.jobs.report").HTML_FILE = "missing/report.html"  # a place that cannot be written
main()
"""
TOLD = """
import json
from snows_hf.jobs.subject import load_told
from snows_hf.runtime.run import Run
told = []
load_told(Run(on_progress=lambda where: told.append((where.stage, where.done, where.total))), "me/large")
print(json.dumps(told))
"""
LICENCE = "---\nlicense: other\nlicense_name: digits-licence\nlicense_link: LICENSE\n---\n# A model\n"

STOCK = """
import io, json, re, sys
import pyarrow.parquet, torch
from PIL import Image
from huggingface_hub import hf_hub_download

rows = pyarrow.parquet.read_table(hf_hub_download("me/digits", "test.parquet", repo_type="dataset")).to_pylist()
images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
labels = torch.tensor([row["label"] for row in rows])
top1 = {}
for repository in sys.argv[1:]:
    card = open(hf_hub_download(repository, "README.md"), encoding="utf-8").read()
    names = {}
    exec(re.search("```python\\n(.*?)```", card, re.DOTALL)[1], names)
    if "processor" in names:
        logits = lambda: names["model"](**names["processor"](images=images, return_tensors="pt")).logits
    else:
        logits = lambda: names["model"](torch.stack([names["transform"](image) for image in images]))
    with torch.no_grad():
        top1[repository] = 100 * float((logits().argmax(1) == labels).double().mean())
assert "snows_hf" not in sys.modules
print(json.dumps(top1))
"""


@dataclass(frozen=True)
class Machine:
    """A user's computer: an empty home, a cache and a folder to work in."""

    hub: Hub
    place: Path

    @property
    def cache(self) -> Path:
        return self.place / "home/hub"

    def python(self, *arguments: object, token: str | None = WRITER, offline: bool = False) -> "Outcome":
        (self.place / "work").mkdir(parents=True, exist_ok=True)
        home = str(self.place / "home")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))} | {
            "HOME": home, "HF_HOME": home, "HF_ENDPOINT": self.hub.url, "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "1" if offline else "0", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        if token is not None:
            environment["HF_TOKEN"] = token
        done = warm.run(*arguments, cwd=self.place / "work", env=environment)
        for secret in (WRITER, READER):  # whatever the command did
            assert secret not in done.stdout + done.stderr
            for path in (self.place / "work").rglob("*"):
                assert path.is_dir() or secret.encode() not in path.read_bytes(), path
        return Outcome(done.returncode, done.stdout, done.stderr)

    def __call__(self, *arguments: object, **options: Any) -> "Outcome":
        return self.python("-m", "snows_hf", *arguments, **options)


@dataclass(frozen=True)
class Outcome:
    """What a process did."""

    code: int
    out: str
    err: str

    def fails_with(self, *parts: str) -> None:
        assert self.code == 1, self
        assert "Traceback" not in self.err
        assert self.out == ""
        message = self.err[self.err.index("Error: ") :]
        for part in parts:
            assert part in message

    def succeeds(self) -> "Outcome":
        assert self.code == 0, self.err
        return self


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as repositories have it: with a card, and a licence of its own."""
    folder = copy_of(VIT, tmp_path_factory.mktemp("repository") / "vit")
    (folder / "README.md").write_text(LICENCE)
    (folder / "LICENSE").write_text("Do good.")
    return folder


def fill(hub: Hub, model: Path) -> Hub:
    hub.add("models", "me/vit", model)
    hub.add("models", "me/gated", model, gated=True)
    hub.add("datasets", "me/digits", DIGITS)
    hub.add("datasets", "me/gated", DIGITS, gated=True)
    return hub


@pytest.fixture(scope="module")
def hub(model: Path) -> Iterator[Hub]:
    with fill(Hub(), model).running() as hub:
        yield hub


@pytest.fixture(scope="module")
def published(hub: Hub, tiny_timm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Reports of two prunes from the Hub to the Hub, by the repository that was made."""
    hub.add("models", "me/tiny", tiny_timm)
    machine = Machine(hub, tmp_path_factory.mktemp("publisher"))
    reports = {}
    for source, options in (("me/vit", ["--private"]), ("hf-hub:me/tiny", [])):
        target = f"{source.removeprefix('hf-hub:')}-2to4"
        data = ("--eval-data", "me/digits@main", "--push-to", target, "--output", f"out/{target}", "--json", *options)
        reports[target] = json.loads(machine("prune", source, *QUICK, *data).succeeds().out)
    return reports


@pytest.mark.slow
def test_prune_from_hub_to_hub(hub: Hub, published: dict[str, dict[str, Any]]) -> None:
    for name, report in published.items():
        repository = hub.repositories["models", name]
        assert repository.private == (name == "me/vit-2to4")
        assert len(repository.commits) == 2  # the empty one, and all files at once
        files = repository.files
        assert {"README.md", "config.json", "model.safetensors", "snows_config.json"} <= files.keys()
        assert report["pushed_to"]["repository"] == name
        assert report["pushed_to"]["revision"] == repository.commits[-1][0]
        assert report["eval_data"] == {"name": "me/digits", "split": "test", "revision": "main"}
        assert json.loads(files["config.json"])["snows"]["pattern"] == "2:4"
    assert hub.repositories["models", "me/vit-2to4"].files["LICENSE"] == b"Do good."


@pytest.mark.slow
def test_stock_libraries_load_the_repository_as_its_card_says(
    hub: Hub, published: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    machine = Machine(hub, tmp_path)
    measured = json.loads(machine.python("-c", STOCK, *published).succeeds().out)
    assert measured == pytest.approx({name: report["pruned"]["top1"] for name, report in published.items()}, abs=1e-9)


@pytest.mark.slow
def test_the_cards_metadata_are_the_report(hub: Hub, published: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    for name, report in published.items():
        snapshot = snapshot_download(name, endpoint=hub.url, cache_dir=tmp_path, token=WRITER)
        card = ModelCard.load(Path(snapshot) / "README.md")
        assert card.data.base_model == report["source"] == name.removesuffix("-2to4")
        assert card.data.datasets == ["me/digits"]
        assert (card.data.library_name, card.data.pipeline_tag) == (report["library"], "image-classification")
        results = {result.metric_name: result for result in card.data.eval_results}
        for metric, key in (("top-1 accuracy (%)", "top1"), ("top-5 accuracy (%)", "top5")):
            result = results[metric]
            assert result.metric_value == pytest.approx(report["pruned"][key], abs=1e-4)
            place = (result.dataset_name, result.dataset_type, result.dataset_split, result.dataset_revision)
            assert place == ("me/digits", "me/digits", "test", "main")
        for key in ("dense", "masked", "pruned"):
            assert f"{report[key]['top1']:.2f}" in card.text
        assert f"{report['parameters']['nonzero']:,}" in card.text
        for layer in report["layers"]:
            assert f"| `{layer['name']}` |" in card.text
        licence = ("other", "digits-licence", "LICENSE") if name == "me/vit-2to4" else (None, None, None)
        assert (card.data.license, card.data.get("license_name"), card.data.get("license_link")) == licence


Scenario = Callable[[Hub, Machine, Path], None]
SCENARIOS: list[Scenario] = []


def scenario(function: Scenario) -> Scenario:
    SCENARIOS.append(function)
    return function


@scenario
@pytest.mark.slow
def a_push_that_fails_after_a_prune_leaves_the_result(hub: Hub, machine: Machine, model: Path) -> None:
    hub.fail("POST", "/commit/", 503)
    output = machine.place / "work/out"
    done = machine("prune", "me/vit", *QUICK, "--layers", "*.0.mlp.fc1", "--push-to", "me/later", "--output", "out")
    assert done.code == 1
    assert "Saved to out" in done.out
    for part in ("out of order (503)", "The result is safe in out", "snows-hf push out me/later"):
        assert part in done.err
    assert hub.repositories["models", "me/later"].files == {".gitattributes": b""}
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    hub.heal()
    machine("push", "out", "me/later").succeeds()
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    files = hub.repositories["models", "me/later"].files
    assert files["model.safetensors"] == before["model.safetensors"]
    assert b'from_pretrained("me/later")' in files["README.md"]


@scenario
@pytest.mark.slow
def a_report_that_fails_is_no_reason_not_to_push(hub: Hub, machine: Machine, model: Path) -> None:
    options = ("--layers", "*.0.mlp.fc1", "--report", "--push-to", "me/pushed", "--output", "out", "--json")
    done = machine.python("-c", NO_REPORT, "prune", "me/vit", *QUICK, *options)
    assert done.code == 1
    assert "`snows-hf report out --dense me/vit --split test --device auto` repeats only the report." in done.err
    found = json.loads(done.out)
    assert (found["page"], found["pushed_to"]["repository"]) == (None, "me/pushed")
    assert "model.safetensors" in hub.repositories["models", "me/pushed"].files
    drawn = ("--data", "me/digits", "--images", 1, "--output", "page", "--json")
    report = json.loads(machine("report", "me/pushed", *drawn).succeeds().out)
    assert (report["name"], report["attention"]["models"][0]["model"]) == ("me/pushed", "me/pushed")
    hub.fail("POST", "/commit/", 503)
    done = machine.python("-c", NO_REPORT, "prune", "me/vit", *QUICK, *options[:-2], "both", "--json")
    assert json.loads(done.out)["pushed_to"] is None
    assert "repeats only the report and `snows-hf push both me/pushed` repeats only the push." in done.err


@scenario
@pytest.mark.slow
def an_upload_that_is_not_taken(hub: Hub, machine: Machine, model: Path) -> None:
    hub.fail("PUT", "/lfs/", 400)  # at once, where the client tries again what breaks off
    machine("push", model, "me/new").fails_with("Model me/new cannot be pushed", "repeat it")
    assert hub.repositories["models", "me/new"].files == {".gitattributes": b""}


@scenario
@pytest.mark.slow
def interrupted_upload(hub: Hub, machine: Machine, model: Path) -> None:
    hub.fail("PUT", "/lfs/", "drop")
    folder = copy_of(model, machine.place / "folder")
    machine("push", folder, "me/new").fails_with("Model me/new cannot be pushed", "repeat it")
    repository = hub.repositories["models", "me/new"]
    assert repository.files == {".gitattributes": b""}
    hub.heal()
    (folder / "notes.docx").write_bytes(b"private")
    assert "notes.docx" in machine("push", folder, "me/new").succeeds().out
    assert repository.files == {".gitattributes": b""} | {p.name: p.read_bytes() for p in model.iterdir()}
    assert len(repository.commits) == 2
    machine("push", folder, "me/new").succeeds()
    assert len(repository.commits) == 2  # nothing new, no commit


@scenario
@pytest.mark.slow
def a_public_repository_stays_public(hub: Hub, machine: Machine, model: Path) -> None:
    hub.add("models", "me/new", model)
    machine("push", model, "me/new", "--private", "--json").fails_with("me/new exists and is public")


@scenario
@pytest.mark.slow
def a_new_push_replaces_the_weights_of_the_last(hub: Hub, machine: Machine, model: Path) -> None:
    repository = hub.add("models", "me/sharded", model)
    own = {"notes.txt": b"kept", "optimizer.safetensors": b"kept", "teacher/model.safetensors": b"kept"}
    old = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "pytorch_model.bin": b""}
    repository.commit(own | old | {"README.md": b"old"})
    result = json.loads(machine("push", model, "me/sharded", "--json").succeeds().out)
    assert (result["repository"], result["revision"]) == ("me/sharded", repository.commits[-1][0])
    assert (result["deleted"], result["left_out"]) == (sorted(old), [])
    assert repository.files == own | {path.name: path.read_bytes() for path in model.iterdir()}
    repository.commit({"pytorch_model.bin": b"old"})
    done = machine("push", model, "me/sharded").succeeds()
    assert "Deleted there, since it would be read in place of the new weights: pytorch_model.bin" in done.out


@scenario
@pytest.mark.slow
def only_files_of_a_checkpoint_are_pushed(hub: Hub, machine: Machine, model: Path) -> None:
    stray = ["holiday.png", "masks.safetensors", "notes.txt", "report.html", "secrets.json", "todo.md"]
    folder = copy_of(model, machine.place / "folder")
    for name in stray:
        (folder / name).write_bytes(
            (model / "model.safetensors").read_bytes() if "safetensors" in name else b"private"
        )
    (folder / "report.json").write_text("{}")
    (folder / "logs").mkdir()
    result = json.loads(machine("push", folder, "me/new", "--json").succeeds().out)
    assert (result["left_out"], result["deleted"]) == (sorted([*stray, "logs"]), [])
    published = {".gitattributes", "report.json", *(path.name for path in model.iterdir())}
    assert hub.repositories["models", "me/new"].files.keys() == published


@scenario
@pytest.mark.slow
def links_out_of_the_folder_are_not_pushed(hub: Hub, machine: Machine, model: Path) -> None:
    folder = copy_of(model, machine.place / "folder")
    secret = machine.place / "secret"
    secret.write_text("my private key")
    for name in ("LICENSE", "README.md"):
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
    (folder / "LICENSE.own").write_text("Do good.")
    (folder / "LICENSE.too").symlink_to("LICENSE.own")
    result = json.loads(machine("push", folder, "me/new", "--json").succeeds().out)
    assert result["left_out"] == ["LICENSE", "README.md"]
    files = hub.repositories["models", "me/new"].files
    assert files["LICENSE.too"] == files["LICENSE.own"] == b"Do good."
    assert not files.keys() & {"LICENSE", "README.md"} and b"my private key" not in b"".join(files.values())
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(machine.place / name)
        (folder / name).symlink_to(machine.place / name)
        done = machine("push", folder, "me/other")
        done.fails_with(f"{folder}/{name} is a link to", "is no part of the checkpoint", "Put the file itself")
        (folder / name).unlink()
        (machine.place / name).rename(folder / name)
    assert ("models", "me/other") not in hub.repositories


@scenario
@pytest.mark.slow
def images_of_a_repository(hub: Hub, machine: Machine, model: Path) -> None:
    """Files of its own are read, streamed and from the cache; those that a row names elsewhere are not asked for."""
    folder = machine.place / "images"
    for i in range(4):
        (folder / f"test/{i}").mkdir(parents=True)
        Image.new("L", (8, 8), 60 * i).save(folder / f"test/{i}/{i}.png")
    hub.add("datasets", "me/images", folder)
    measured = json.loads(machine("eval", VIT, "--data", "me/images", "--json").succeeds().out)
    assert measured["images"] == 4
    snapshot_download("me/images", endpoint=hub.url, cache_dir=machine.cache, repo_type="dataset")
    done = machine("eval", VIT, "--data", "me/images", "--json", offline=True).succeeds()
    assert json.loads(done.out) == measured
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    for name, path in (("me/named", "hf://datasets/me/images@main/test/0/0.png"), ("me/url", f"{hub.url}/x.png")):
        images = pyarrow.array([{"bytes": None, "path": path}], features["image"].pa_type)
        table = pyarrow.table({"image": images, "label": pyarrow.array([0], pyarrow.int64())})
        rows = machine.place / name
        rows.mkdir(parents=True)
        pyarrow.parquet.write_table(table.cast(features.arrow_schema), rows / "test.parquet")
        hub.add("datasets", name, rows)
        hub.heal()
        machine("eval", VIT, "--data", name).fails_with(f"given as '{path}', which is no file of the data's own")
        assert not [request for request in hub.requests if "images" in request or "x.png" in request]


@scenario
@pytest.mark.slow
def missing_token(hub: Hub, machine: Machine, model: Path) -> None:
    machine("push", model, "me/none", token=None).fails_with("needs a token, and there is none", "HF_TOKEN", "hf auth")
    assert ("models", "me/none") not in hub.repositories


@scenario
@pytest.mark.slow
def wrong_token(hub: Hub, machine: Machine, model: Path) -> None:
    # Before any work is done: no model is loaded for a prune that could not be pushed.
    early = machine("prune", "me/vit", *QUICK, "--push-to", "me/none", token="hf_wrong")
    early.fails_with("does not accept the token", "settings/tokens")
    assert "hf_wrong" not in early.err
    assert "Loading" not in early.err
    assert ("models", "me/none") not in hub.repositories
    reading = machine("inspect", "me/vit", token="hf_wrong")
    reading.fails_with("does not accept the token")
    assert "hf_wrong" not in reading.err


@scenario
def token_that_may_not_write(hub: Hub, machine: Machine, model: Path) -> None:
    machine("push", model, "me/none", token=READER).fails_with("forbids this for me/none", "HF_TOKEN")
    assert ("models", "me/none") not in hub.repositories


@scenario
def gated_model(hub: Hub, machine: Machine, model: Path) -> None:
    done = machine("inspect", "me/gated", token=None)
    done.fails_with("Model me/gated is gated", f"licence on {hub.url}/me/gated", "HF_TOKEN")


@scenario
@pytest.mark.slow
def gated_dataset(hub: Hub, machine: Machine, model: Path) -> None:
    done = machine("eval", VIT, "--data", "me/gated", token=READER)
    done.fails_with("Dataset me/gated is gated", f"licence on {hub.url}/datasets/me/gated", "HF_TOKEN")


@scenario
@pytest.mark.slow
def no_such_revision(hub: Hub, machine: Machine, model: Path) -> None:
    machine("inspect", "me/vit", "--revision", "v9").fails_with("Model me/vit has no revision 'v9'")
    machine("eval", VIT, "--data", "me/digits@v9").fails_with("Dataset me/digits has no revision 'v9'")


@scenario
@pytest.mark.slow
def interrupted_download(hub: Hub, machine: Machine, model: Path) -> None:
    hub.fail("GET", "me/vit/resolve/.*safetensors", "drop")
    machine("inspect", "me/vit").fails_with("Model me/vit", "cannot be read from the Hub", "connection")
    assert not list(machine.cache.rglob("*.safetensors"))
    assert not list(machine.cache.rglob("*.incomplete"))
    hub.heal()
    for passing in (429, "drop"):  # what the client mends by itself
        hub.fail("GET", "me/vit/resolve/.*safetensors", passing, times=1)
    machine("inspect", "me/vit").succeeds()
    assert len([r for r in hub.requests if r.startswith("GET") and r.endswith("safetensors")]) == 3


@scenario
@pytest.mark.slow
def downloads_are_told_as_they_come(hub: Hub, machine: Machine, model: Path) -> None:
    large = machine.place / "large"
    timm.models.save_for_hf(timm.create_model("vit_tiny_patch16_224"), str(large), safe_serialization=True)
    hub.add("models", "me/large", large)
    told = json.loads(machine.python("-c", TOLD).succeeds().out)
    assert {(stage, total) for stage, _, total in told} == {("Downloading me/large, MB", 23)}
    done = [done for _, done, _ in told]
    assert len(done) >= 3 and done == sorted(done)  # the client reads 10 MB at a time
    size = sum(path.stat().st_size for path in large.glob("*.[sj]*"))
    assert done[-1] == pytest.approx(size / 1e6) and round(done[-1]) == 23


@scenario
@pytest.mark.slow
def what_is_below_the_root_is_not_downloaded(hub: Hub, machine: Machine, model: Path) -> None:
    repository = hub.repositories["models", "me/vit"]
    weights = repository.files["model.safetensors"]
    below = {"checkpoint-500/model.safetensors": weights, "onnx/config.json": b"{}", "old/LICENSE": b""}
    repository.commit(repository.files | below)
    machine("inspect", "me/vit").succeeds()
    snapshot = next(machine.cache.glob("models--me--vit/snapshots/*"))
    assert {path.name for path in snapshot.iterdir()} == {path.name for path in model.iterdir()}


@scenario
@pytest.mark.slow
def a_model_below_the_root_alone(hub: Hub, machine: Machine, model: Path) -> None:
    files = {f"below/{path.name}": path.read_bytes() for path in model.iterdir()}
    hub.repositories["models", "me/below"] = Repository(commits=[("0" * 40, files)])
    machine("inspect", "me/below").fails_with("Model me/below has no config.json at its root")
    assert not list(machine.cache.rglob("*.safetensors"))


@scenario
def corrupt_byte(hub: Hub, machine: Machine, model: Path) -> None:
    hub.fail("GET", "me/vit/resolve/.*safetensors", "corrupt", times=1)
    machine("inspect", "me/vit").fails_with("model.safetensors of me/vit was damaged", "Repeat the command")
    machine("inspect", "me/vit").succeeds()


@scenario
@pytest.mark.slow
def corrupt_byte_of_a_dataset(hub: Hub, machine: Machine, model: Path) -> None:
    hub.fail("GET", "digits/resolve/.*test.parquet", "corrupt")
    machine("eval", VIT, "--data", "me/digits").fails_with("me/digits", "cannot be read")


@scenario
def file_names_that_lead_out_of_the_folder(hub: Hub, machine: Machine, model: Path) -> None:
    outside = machine.place.parent / "escaped.json"
    for names in (
        ("../../../../../escaped.json", str(outside)),
        ("a/../../../../../../escaped.json", "..\\escaped.json"),
    ):
        repository = hub.add("models", "me/hostile", model)
        repository.commit(dict.fromkeys(names, b"{}"))
        done = machine("inspect", "me/hostile")
        assert "Traceback" not in done.err
        assert done.code == 0 or "Model me/hostile" in done.err, done.err
        inside = [path for path in machine.place.rglob("*escaped.json*") if machine.cache not in path.parents]
        assert not inside and not outside.exists() and not (machine.place.parent.parent / "escaped.json").exists()


READ = """
import json, sys, torch
if "hook" in sys.argv:
    import snows_hf
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("me/small").eval()
print(json.dumps(model(torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)).logits.tolist()))
"""


@scenario
@pytest.mark.slow
def packed_repositories_are_read_by_id(hub: Hub, machine: Machine, model: Path) -> None:
    only = ("--layers", "*.0.mlp.fc1", "--output", "out")
    machine("prune", "me/vit", *QUICK, *only, "--format", "packed", "--push-to", "me/small").succeeds()
    assert "model.safetensors" not in hub.repositories["models", "me/small"].files
    machine("unpack", "me/small", "dense").succeeds()
    machine("unpack", "out", "here").succeeds()
    for path in (machine.place / "work/here").iterdir():
        expected = path.read_bytes().replace(b"THIS_FOLDER", b"me/small")  # in the card
        assert (machine.place / "work/dense" / path.name).read_bytes() == expected
    assert b'snows_hf.from_pretrained("me/small")' in hub.repositories["models", "me/small"].files["README.md"]
    sizes = json.loads(machine("pack", "me/vit", "packed", "--revision", "main", "--json").succeeds().out)
    assert sizes["bytes_before"] == (model / "model.safetensors").stat().st_size
    measured = json.loads(machine("eval", "me/small", "--data", "me/digits", "--json").succeeds().out)["top1"]
    assert measured == evaluate(machine.place / "work/dense", DIGITS).top1
    assert machine.python("-c", READ, "hook").succeeds().out.startswith("[[")
    stock = machine.python("-c", READ)
    assert stock.code != 0 and stock.out == ""


@scenario
@pytest.mark.slow
def too_many_requests(hub: Hub, machine: Machine, model: Path) -> None:
    hub.fail("GET", "/api/models/me/vit", 429)
    machine("inspect", "me/vit").fails_with("number of requests (429)", "Wait")


@scenario
@pytest.mark.slow
def hub_out_of_order(hub: Hub, machine: Machine, model: Path) -> None:
    hub.fail("GET", "/api/datasets/me/digits", 503)
    machine("eval", VIT, "--data", "me/digits").fails_with("out of order (503), at dataset me/digits", "later")


@scenario
@pytest.mark.slow
def offline_without_cache(hub: Hub, machine: Machine, model: Path) -> None:
    machine("inspect", "me/vit", offline=True).fails_with("Model me/vit", "offline mode is on", "hf download me/vit`")
    done = machine("eval", VIT, "--data", "me/digits", offline=True)
    done.fails_with("Dataset me/digits", "offline mode is on", "hf download me/digits --repo-type dataset`")


def without_a_hub(machine: Machine) -> Machine:
    return Machine(SimpleNamespace(url=NO_HUB), machine.place)


def with_a_part_of_the_cache(hub: Hub, machine: Machine, part: str) -> None:
    snapshot_download("me/vit", endpoint=hub.url, cache_dir=machine.cache, allow_patterns=[part])
    done = machine("inspect", "me/vit", offline=True)
    done.fails_with("Model me/vit", "offline mode is on, and the cache does not hold all of it", "hf download")
    done = without_a_hub(machine)("inspect", "me/vit")
    done.fails_with("Model me/vit", "is not whole in the cache", "Check", "connection")


@scenario
@pytest.mark.slow
def cache_that_holds_a_part(hub: Hub, machine: Machine, model: Path) -> None:
    with_a_part_of_the_cache(hub, machine, "config.json")


@scenario
@pytest.mark.slow
def cache_that_is_filled_up(hub: Hub, machine: Machine, model: Path) -> None:
    for part in ("config.json", "*.safetensors"):
        with_a_part_of_the_cache(hub, machine, part)
    machine("inspect", "me/vit").succeeds()
    without_a_hub(machine)("inspect", "me/vit").succeeds()


@scenario
@pytest.mark.slow
def offline_with_cache(hub: Hub, machine: Machine, model: Path) -> None:
    snapshot_download("me/vit", endpoint=hub.url, cache_dir=machine.cache)
    snapshot_download("me/digits", endpoint=hub.url, cache_dir=machine.cache, repo_type="dataset")
    hub.heal()
    done = machine("eval", "me/vit", "--data", "me/digits", "--json", offline=True).succeeds()
    assert json.loads(done.out)["images"] == 597
    assert hub.requests == []
    done = machine("push", VIT, "me/none", offline=True)
    done.fails_with("offline mode is on", "HF_HUB_OFFLINE")


def marked(scenario: Scenario) -> Any:
    """A scenario as a parameter, with its own marks."""
    return pytest.param(scenario, id=scenario.__name__, marks=getattr(scenario, "pytestmark", ()))


@pytest.mark.parametrize("chosen", [marked(scenario) for scenario in SCENARIOS])
def test_scenario(chosen: Scenario, model: Path, tmp_path: Path) -> None:
    with fill(Hub(), model).running() as hub:
        chosen(hub, Machine(hub, tmp_path), model)


def test_push_of_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"has no config\.json"):
        push(DIGITS, "me/new")
    folder = copy_of(VIT, tmp_path / "shards")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(LoadError, match="names shards that are not beside it"):
        push(folder, "me/new")
