"""What is saved loads in a process that has never heard of this package."""

import json
import re
from pathlib import Path

import pytest
import torch
import warm
from embedded import DIGITS, Pruned
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from snows_hf import load


TRANSFORMERS = """
import io, json, sys
import pyarrow.parquet
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

rows = pyarrow.parquet.read_table(sys.argv[1]).to_pylist()
images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
labels = torch.tensor([row["label"] for row in rows])
top1 = {}
for folder in sys.argv[2:]:
    model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    inputs = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
    with torch.no_grad():
        top1[folder] = 100 * float((model.eval()(**inputs).logits.argmax(1) == labels).double().mean())
assert "snows_hf" not in sys.modules
print(json.dumps(top1))
"""

TIMM = """
import sys
import timm
import torch
from safetensors.torch import load_file, save_file

images = load_file(sys.argv[2])["images"]
model = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
with torch.no_grad():
    save_file({"logits": model(images)}, sys.argv[3])
assert "snows_hf" not in sys.modules
"""


def python(script: str, *arguments: object) -> str:
    done = warm.run("-c", script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def some_images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_transformers_measures_the_accuracy_of_the_report(results: dict[str, Pruned]) -> None:
    folders = {str(results[name].folder): results[name].report["pruned"]["top1"] for name in ("vit", "resnet")}
    assert json.loads(python(TRANSFORMERS, DIGITS / "test.parquet", *folders)) == pytest.approx(folders, abs=1e-9)


def test_timm_computes_the_same_logits(results: dict[str, Pruned], tmp_path: Path) -> None:
    folder = results["timm"].folder
    save_file({"images": some_images()}, tmp_path / "images.safetensors")
    python(TIMM, folder, tmp_path / "images.safetensors", tmp_path / "logits.safetensors")
    with torch.no_grad():
        expected = load(str(folder)).model(some_images())
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)


def test_the_cards_snippet_runs(results: dict[str, Pruned]) -> None:
    for result in results.values():
        card = (result.folder / "README.md").read_text()
        snippet = re.search("```python\n(.*?)```", card, re.DOTALL)[1]
        names: dict[str, object] = {}
        exec(snippet.replace("THIS_FOLDER", str(result.folder)), names)
        state = names["model"].state_dict()
        assert all(torch.equal(state[name], t) for name, t in load(str(result.folder)).model.state_dict().items())


def test_transformers_loads_timm_folders(results: dict[str, Pruned]) -> None:
    folder = results["timm"].folder
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(model(some_images()).logits, load(str(folder)).model(some_images()))
