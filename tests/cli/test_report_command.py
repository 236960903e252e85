"""``snows-hf report`` and ``compare``: the pages, the data, and folders that are not what they seem."""

import json
import shlex
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from embedded import DIGITS, RESNET, VIT, pruned, tensors_of

from snows_hf.data.accuracy import Accuracy
from snows_hf.hub.repack import pack
from snows_hf.jobs.report import input_zeros
from snows_hf.reports.page import LogAxis, by_reason, class_changes, inputs_view, pareto_of, shown_classes


HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Tags and attributes of a page, in order, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned ViT with accuracies, in a folder of its own."""
    folder = tmp_path_factory.mktemp("made") / "vit"
    pruned(VIT, folder, eval_data=str(DIGITS), mask="magnitude")
    return folder


def page(path: Path) -> Page:
    found = Page(path.read_text(encoding="utf-8"))
    assert "script" not in found.tags
    for name, value in found.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert str(value).startswith("data:")  # nothing outside this file
    return found


def test_prune_with_report(run, small_vit: Path) -> None:
    options = ("--pattern", "2:4", "--data", DIGITS, "--eval-data", DIGITS, "--samples", 32, "--k", 1)
    steps = ("--layers", "*layers.0*", "--set", "sweeps=1")
    assert run("prune", small_vit, *options, *steps, "--output", "v", "--report").code == 0
    report = json.loads(Path("v/report.json").read_text())
    shown = page(Path("v/report.html"))
    assert shown.tags.count("img") == 1  # attention maps
    assert [row["model"] for row in report["attention"]["models"]] == ["dense", "dense weights, masked", "v"]
    assert report["attention"]["models"][1]["last"]["correlation"] < 1
    for key in ("dense", "masked", "pruned"):
        assert f"{report[key]['top1']:.2f} % top-1" in shown.text
    assert "At the start: the mask alone, or the criterion's own weights where these are better" in shown.text
    assert "fewer operations, if zeros are skipped; stock libraries do not" in shown.text
    assert "it reads the images" in shown.text  # why the stem is dense
    assert "the mask's K-step loss" not in shown.text
    for layer in report["layers"]:
        assert layer["name"] in shown.text
        assert f"{layer['loss_start']:.3g} → {layer['loss_pruned']:.3g}" in shown.text
        assert sum(layer["cg_statuses"].values()) == layer["steps"] == len(layer["losses"])
        assert layer["losses"] == sorted(layer["losses"], reverse=True)
        assert layer["losses"][-1] == layer["loss_pruned"]
        inputs = report["inputs"][layer["name"]]
        assert inputs["count"] == layer["shape"][1]
        assert sum(inputs["shares"]) / len(inputs["shares"]) == pytest.approx(0.5, abs=0.02)
    classes = report["class_changes"]["classes"]
    assert sum(c["images"] for c in classes) == report["dense"]["images"]
    for key in ("dense", "pruned"):
        assert 100 * sum(c[key] for c in classes) / 597 == pytest.approx(report[key]["top1"])
    assert report["flops"]["reduction"] == report["flops"]["dense"] / report["flops"]["pruned"] > 1
    assert sorted(path.suffix for path in Path("v").iterdir()).count(".html") == 1
    assert not [path for path in Path("v").iterdir() if path.name.startswith(".")]


def test_hostile_names_are_text(run, made: Path) -> None:
    shutil.copytree(made, "hostile")
    path = Path("hostile/snows_config.json")
    report = json.loads(path.read_text())
    report |= {"name": HOSTILE, "source": HOSTILE, "hardware": HOSTILE}
    report["layers"][0]["name"] = report["calibration_data"]["name"] = report["settings"]["mask"] = HOSTILE
    path.write_text(json.dumps(report))
    config = json.loads(Path("hostile/config.json").read_text())
    config["id2label"]["3"] = HOSTILE
    config["label2id"] = {name: int(number) for number, name in config["id2label"].items()}
    Path("hostile/config.json").write_text(json.dumps(config))
    assert run("report", "hostile").code == 0
    assert run("compare", "hostile", made, "--output", "two.html").code == 0
    for made_page in ("hostile/report.html", "two.html"):
        shown = page(Path(made_page))
        assert "img" not in shown.tags
        assert HOSTILE in shown.text


def test_mask_alone_packed_and_without_accuracy(run, tmp_path: Path) -> None:
    pruned(RESNET, tmp_path / "m", update=False)
    pack(tmp_path / "m", tmp_path / "p")
    result = run("report", tmp_path / "p", "--output", "new", "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert Path(report["html"]) == Path("new/report.html")
    assert not (tmp_path / "p" / "report.html").exists()
    packed = sum(path.stat().st_size for path in (tmp_path / "p").glob("*.safetensors"))
    assert report["size"]["packed"] == pytest.approx(packed, rel=0.1)  # the file has a header besides
    assert report["size"]["dense"] == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "m").values())
    text = page(Path("new/report.html")).text
    assert "Not measured" in text
    assert "--no-update" in text
    assert "img" not in page(Path("new/report.html")).tags


def test_compare(run, made: Path, tmp_path: Path) -> None:
    pruned(RESNET, tmp_path / "mask", update=False)
    result = run("compare", made, tmp_path / "mask", "--json")
    assert result.code == 0
    vit, mask = json.loads(result.out)["models"]
    stored = json.loads((made / "snows_config.json").read_text())
    assert vit["drop"] == pytest.approx(stored["dense"]["top1"] - stored["pruned"]["top1"])
    assert vit["products"] == sum(layer["cg_iterations"] for layer in stored["layers"] + stored["later_sweeps"])
    assert 0 < vit["loss_left"] < 1
    assert mask["pruned"] is mask["drop"] is mask["loss_left"] is None
    people = run("compare", made, tmp_path / "mask", "--output", "both.html")
    assert people.code == 0
    assert f"{vit['pruned']:.2f}" in people.out
    assert f"{vit['pruned']:.2f}" in page(Path("both.html")).text
    assert "Accuracy kept over operations left" not in Path("both.html").read_text()  # of one there is none to keep
    run("compare", made, made, "--output", "twice.html")
    assert "Accuracy kept over operations left" in page(Path("twice.html")).text
    again = run("compare", made, "--output", "both.html")
    assert (again.code, "exists" in again.err) == (1, True)
    assert run("compare", made, "--output", "both.txt").code == 1


def test_names_are_text_and_tell_models_apart(run, made: Path) -> None:
    for folder in ("one", "two"):
        shutil.copytree(made, folder)
        path = Path(folder, "snows_config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "[/x][red]", "pattern": "[/x]"}))
    alone, both = run("compare", "one"), run("compare", "one", "two")
    assert (alone.code, both.code) == (0, 0)
    assert "[/x][red]" in alone.out
    assert "digits (test)" in alone.out
    assert "one" in both.out and "two" in both.out and "[red]" not in both.out


def test_damaged_reports_are_one_message(run, made: Path) -> None:
    whole = json.loads((made / "snows_config.json").read_text())
    shutil.copytree(made, "bad")
    damages = [
        {"layers": [{"name": "x"}]},
        {"layers": [whole["layers"][0] | {"parameters": ["no.such.weight"]}]},
        {"layers": 7},
        {"flops": {"dense": 1, "pruned": 0}},
        {"settings": None},
        {"pruned": {"top1": "high", "top5": 1, "images": 1}},
        {"dense": {"confusion": {"a b": 1}, "top1": 1}},
        {"parameters": {"total": 1}},
        {"name": 5},
        {"seconds": "abc"},
        {"samples": [1]},
        {"sparsity": 10**400},
        {"finetune": {"after": None}},
        {"earlier_finetunes": [{}]},
        {"calibration_data": {"name": "a"}},
    ]
    for damage in damages:
        Path("bad/snows_config.json").write_text(json.dumps(whole | damage))
        result = run("report", "bad")
        assert result.code == 1, damage
        assert "is not a report that this version" in result.err, damage
        assert not Path("bad/report.html").exists()
        assert not Path("bad/report.json").exists()
        compared = run("compare", "bad", "--output", "bad.html")
        assert compared.code == 1 or "parameters" in damage, damage  # which only the page of one model shows
        Path("bad.html").unlink(missing_ok=True)
    Path("bad/snows_config.json").write_text(json.dumps(whole | {"seconds": float("nan")}))
    for command in ("report", "compare"):
        result = run(command, "bad")
        assert (result.code, "is not valid JSON" in result.err) == (1, True)
    assert run("report", VIT).code == 1  # was never pruned
    assert run("report", "nowhere/at-all").code == 1
    assert run("report", made, "--output", "bad/config.json").code == 1


def test_many_classes_are_a_list(run, made: Path) -> None:
    shutil.copytree(made, "many")
    path = Path("many/snows_config.json")
    report = json.loads(path.read_text())
    report["dense"]["confusion"] = {f"{i} {i}": 10 for i in range(30)}
    report["pruned"]["confusion"] = {f"{i} {i}": 10 - i % 3 for i in range(30)} | {f"{i} 0": i % 3 for i in range(30)}
    path.write_text(json.dumps(report))
    assert run("report", "many").code == 0
    text = page(Path("many/report.html")).text
    assert "the classes that changed most, of 30" in text
    assert "Confusions that changed most" in text
    assert "8 of 10" in text
    assert "Changes of the confusion matrix" not in text


def test_retrained_weights_count(run, made: Path) -> None:
    shutil.copytree(made, "tuned")
    path = Path("tuned/snows_config.json")
    report = json.loads(path.read_text())
    data = {"name": "digits", "split": "test", "revision": None}
    report["finetune"] = {"before": report["pruned"], "after": report["dense"], "epochs": 3, "images": 9, "data": data}
    for eval_data in (report["eval_data"], {**data, "name": "other"}):
        report["finetune"]["eval_data"] = eval_data
        path.write_text(json.dumps(report))
        assert run("report", "tuned").code == 0
        text = page(Path("tuned/report.html")).text
        assert "Retrained for 3 epochs on 9 images" in text
        changes = json.loads(Path("tuned/report.json").read_text())["class_changes"]
        row = json.loads(run("compare", "tuned", "--json").out)["models"][0]
        assert row["pruned"] == report["dense"]["top1"]
        if eval_data == report["eval_data"]:
            assert (changes["confusions"], row["drop"]) == ([], 0)
        else:  # what was measured on other images is not compared
            assert changes is row["drop"] is None


def test_every_retraining_is_told(run, made: Path) -> None:
    options = ("--data", DIGITS, "--samples", 32, "--epochs", 1)
    for before, after, more in ((made, "once", ("--eval-data", DIGITS)), ("once", "twice", ())):
        assert run("finetune", before, *options, *more, "--output", after).code == 0
    report = json.loads(run("report", "twice", "--json").out)
    first, last = report["earlier_finetunes"][0], report["finetune"]
    assert (first["model"], last["model"], last["after"]) == ("vit", "once", None)
    assert report["class_changes"] is None  # nothing measured the weights that are in the folder
    text = page(Path("twice/report.html")).text
    card = Path("twice/README.md").read_text()
    for shown in (text, card):
        assert f"{first['after']['top1']:.2f}" in shown
        assert shown.count("etrained for 1 epochs on 32") == 2
        assert "ccuracy after that was not measured" in shown
    assert "and then retrained with labels" in text
    assert "before it was retrained" in text
    assert json.loads(Path("twice/config.json").read_text())["snows"]["finetuned_epochs"] == 2
    row = run("compare", "once").out
    assert f"{first['after']['top1']:.2f} (retrained)" in " ".join(row.split())


@pytest.mark.slow
def test_a_failed_report_leaves_the_result(
    run, elsewhere: Path, small_vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["snows_hf.jobs.report"], "HTML_FILE", "missing/report.html"
    )  # a place that cannot be written
    options = (
        "--pattern",
        "2:4",
        "--data",
        DIGITS,
        "--samples",
        8,
        "--mask",
        "magnitude",
        "--no-update",
        "--output",
        "a b",
        "--report",
    )
    result = run("prune", small_vit, *options, "--eval-data", DIGITS)
    assert result.code == 1
    assert Path("a b/model.safetensors").is_file()
    assert not Path("a b/report.html").exists()
    monkeypatch.undo()
    monkeypatch.chdir(elsewhere)
    _, again, _ = result.err[result.err.index("The result is safe in a b: ") :].split("`")
    assert run(*shlex.split(again)[1:]).code == 0
    assert Path("a b/report.html").is_file()
    assert json.loads(Path("a b/report.json").read_text())["attention"] is not None


def test_another_dense_model_is_refused(run, made: Path) -> None:
    result = run("report", made, "--output", "o", "--dense", RESNET, "--data", DIGITS)
    assert result.code == 1
    assert "Give the model that was pruned as --dense" in result.err
    assert not Path("o").exists()


def test_class_changes_by_hand() -> None:
    before = Accuracy(50, 100, 4, {"0 0": 1, "0 2": 1, "2 2": 1, "2 0": 1}).to_dict()
    after = Accuracy(50, 100, 4, {"0 0": 2, "2 0": 2}).to_dict()
    changes = class_changes(before, after, ("a", "b", "c"))
    assert changes == {
        "classes": [
            {"name": "a", "images": 2, "dense": 1, "pruned": 2},
            {"name": "c", "images": 2, "dense": 1, "pruned": 0},
        ],
        "confusions": [
            {"true": 0, "predicted": 1, "dense": 1, "pruned": 0},
            {"true": 1, "predicted": 0, "dense": 1, "pruned": 2},
        ],
    }
    assert class_changes({"top1": 1.0}, after, None) is None  # reports from before there were confusions


def test_class_bars_are_of_all_the_classs_images() -> None:
    classes = [
        {"name": "a", "images": 50, "dense": 40, "pruned": 45},
        {"name": "b", "images": 200, "dense": 150, "pruned": 148},
    ]
    lost, gained = shown_classes({"classes": classes, "confusions": []})["rows"]
    assert (lost["name"], lost["both"], lost["change"]) == ("b", 74, -1)
    assert (gained["name"], gained["both"], gained["change"]) == ("a", 80, 10)


def test_input_zeros_and_axis() -> None:
    weight = torch.ones(3, 2, 2, 1)
    weight[0] = 0
    weight[2, 0] = 0
    assert input_zeros([weight]) == {"count": 2, "unread": 0, "shares": [0.3333, 0.6667]}
    weight[1, 0] = 0
    assert input_zeros([weight, weight]) == {"count": 2, "unread": 1, "shares": [0.3333, 1]}
    assert input_zeros([weight, weight[:, :1]], cells=2) == {"count": 3, "unread": 2, "shares": [0.3333, 1]}
    found = inputs_view({"count": 2, "unread": 1, "shares": [0.25, 1]})
    assert found["curve"] == "0,20 0.0,15.0 100.0,0.0 100,20"
    assert inputs_view({"count": 1, "unread": 0, "shares": [0.5]})["curve"] == "0,20 0.0,10.0 100.0,10.0 100,20"
    assert by_reason({"a": "x", "b": "y", "c": "x"}) == [("x", ["a", "c"]), ("y", ["b"])]
    axis = LogAxis([0.02, 30])
    assert [axis.place(x) for x in (0.01, 1, 100)] == [0, 50, 100]
    assert axis.place(None) is axis.place(0) is None
    assert len(LogAxis([1e-12, 1e9]).ticks()) <= 6


def test_pareto_by_hand() -> None:
    def row(name: str, reduction: float, kept: float | None, masked: float | None = 90.0) -> dict[str, object]:
        made = {"name": name, "flops": {"reduction": reduction}, "kept": kept, "kept_masked": masked, "update": True}
        return made

    assert pareto_of([row("a", 2, 99), row("b", 4, None)]) is None  # nothing to compare
    found = pareto_of([row("a", 2, 99), row("b", 2, 98), row("c", 4, 95), row("d", 1.25, 99, 98), row("e", 1, None)])
    assert [(p["number"], p["best"]) for p in found["points"]] == [(1, True), (2, False), (3, True), (4, False)]
    ((left, right),) = found["front"]
    assert (left["name"], right["name"]) == ("c", "a")
    assert left["x"] < right["x"] and left["y"] > right["y"]  # fewer operations, less accuracy: further down
    assert found["points"][0]["masked"] == found["floor"]  # it lies below the picture
    assert found["points"][3]["y"] < found["points"][3]["masked"] < 100
    assert all(0 < place < 100 for point in found["points"] for place in (point["x"], point["y"]))


@pytest.mark.parametrize("where", ["prune", "report"])
def test_without_attention_neither_model_is_looked_into(run, tmp_path: Path, where: str) -> None:
    options = ("--layers", "*stages.0*", "--samples", 8, "--k", 0, "--data", DIGITS, "--eval-data", DIGITS)
    page = ("--report",) if where == "prune" else ()
    made = run("prune", RESNET, "--pattern", "2:4", *options, "--no-update", "--output", "m", *page)
    assert made.code == 0
    result = made
    if where == "report":  # a dense model that is not there is not missed either
        result = run("report", "m", "--data", DIGITS, "--dense", tmp_path / "nowhere")
    assert result.code == 0
    said = result.err[result.err.index("Loading m\n") :]
    assert "No attention maps: ResNetForImageClassification has no attention to draw.\n" in said
    assert "Loading /" not in said and "Computing" not in said
    assert json.loads(Path("m/report.json").read_text())["attention"] is None
