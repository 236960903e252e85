"""Train the two small models of the embedded demo and write them, with their data, as ordinary checkpoints.

Run from the repository root (about two minutes on one CPU core; needs scikit-learn besides the package itself):

    python examples/train_digits.py

The data are the 1797 scanned 8x8 grey digits that come with scikit-learn. The script splits them into a train and a
test part and writes both as parquet, trains a ViT and a ResNet on the train part, saves each as a transformers
checkpoint, measures the top-1 accuracy on the test part, and writes a README with the results:

    OUTPUT/digits/{train,test}.parquet
    OUTPUT/vit_digits/{config.json,model.safetensors,preprocessor_config.json}
    OUTPUT/resnet_digits/{config.json,model.safetensors,preprocessor_config.json}
    OUTPUT/README.md
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ViTConfig,
    ViTImageProcessor,
    get_cosine_schedule_with_warmup,
    set_seed,
)


CLASS_NAMES = [str(digit) for digit in range(10)]
LABEL_NAMES = {"id2label": dict(enumerate(CLASS_NAMES)), "label2id": {name: i for i, name in enumerate(CLASS_NAMES)}}
TEST_SIZE = 597
SPLIT_SEED = 0
BATCH_SIZE = 64
WARMUP_FRACTION = 0.1
MAX_ROTATION_DEGREES = 12.0
MAX_SHIFT_FRACTION = 0.1


@dataclass(frozen=True)
class Recipe:
    """What to build and how long and how hard to train it."""

    folder: str
    title: str
    config: PreTrainedConfig
    image_size: int
    epochs: int
    learning_rate: float
    weight_decay: float


RECIPES = [
    Recipe(
        folder="vit_digits",
        title="ViT",
        config=ViTConfig(
            image_size=16,
            patch_size=4,
            num_channels=3,
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=96,
            **LABEL_NAMES,
        ),
        image_size=16,
        epochs=150,
        learning_rate=1e-3,
        weight_decay=0.5,
    ),
    Recipe(
        folder="resnet_digits",
        title="ResNet",
        config=ResNetConfig(
            layer_type="basic",
            num_channels=3,
            embedding_size=16,
            hidden_sizes=[16, 32, 64],
            depths=[1, 1, 1],
            **LABEL_NAMES,
        ),
        image_size=32,
        epochs=60,
        learning_rate=3e-3,
        weight_decay=0.05,
    ),
]


@dataclass(frozen=True)
class Result:
    """What one training run gave, for the README."""

    recipe: Recipe
    parameters: int
    top1: float


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits as train.parquet and test.parquet, split by class with a fixed seed."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    train_rows, test_rows = train_test_split(
        np.arange(len(pixels)), test_size=TEST_SIZE, stratify=digits.target, random_state=SPLIT_SEED
    )
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES)})
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in {"train": train_rows, "test": test_rows}.items():
        columns = {
            "image": [PILImage.fromarray(pixels[row]) for row in rows],
            "label": digits.target[rows].tolist(),
        }
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


def save_image_processor(folder: Path, image_size: int) -> None:
    """Save the processor that upscales the images (bilinear) and brings the pixel values into [-1, 1]."""
    processor = ViTImageProcessor(
        size={"height": image_size, "width": image_size},
        resample=PILImage.Resampling.BILINEAR,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    processor.save_pretrained(folder)


def preprocess(folder: Path, split: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixel values and labels of a whole split, made by the processor that is saved in the folder."""
    processor = AutoImageProcessor.from_pretrained(folder)
    images = [image.convert("RGB") for image in split["image"]]
    return processor(images, return_tensors="pt")["pixel_values"], torch.tensor(split["label"])


def augment(pixel_values: torch.Tensor) -> torch.Tensor:
    """Rotate and shift each image a little at random; what comes in from outside is black."""
    count, black = len(pixel_values), -1.0
    angle = (torch.rand(count) * 2 - 1) * math.radians(MAX_ROTATION_DEGREES)
    # Affine grid coordinates run from -1 to 1, so a shift by a fraction of the width is twice that fraction.
    shift = (torch.rand(count, 2) * 2 - 1) * 2 * MAX_SHIFT_FRACTION
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(count, 2, 3)
    grid = F.affine_grid(affine, list(pixel_values.shape), align_corners=False)
    return F.grid_sample(pixel_values - black, grid, align_corners=False) + black


def make_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and kernels only, not on biases and normalization weights."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def train(model: PreTrainedModel, pixel_values: torch.Tensor, labels: torch.Tensor, recipe: Recipe) -> None:
    """Train the model in place with augmented batches and a cosine learning rate."""
    steps = recipe.epochs * math.ceil(len(labels) / BATCH_SIZE)
    optimizer = make_optimizer(model, recipe)
    scheduler = get_cosine_schedule_with_warmup(optimizer, int(WARMUP_FRACTION * steps), steps)
    model.train()
    for epoch in range(1, recipe.epochs + 1):
        epoch_loss = 0.0
        for rows in torch.randperm(len(labels)).split(BATCH_SIZE):
            logits = model(pixel_values=augment(pixel_values[rows])).logits
            loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            epoch_loss += loss.item() * len(rows)
        if epoch % 10 == 0:
            print(f"{recipe.title}: epoch {epoch}/{recipe.epochs}, train loss {epoch_loss / len(labels):.4f}")


@torch.no_grad()
def top1_accuracy(model: PreTrainedModel, pixel_values: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of images whose highest logit is that of the true class."""
    model.eval()
    return (model(pixel_values=pixel_values).logits.argmax(dim=-1) == labels).float().mean().item()


def build_checkpoint(output: Path, recipe: Recipe, digits: DatasetDict, seed: int) -> Result:
    """Train one model, save it, and measure the saved checkpoint on the test split."""
    set_seed(seed)
    folder = output / recipe.folder
    save_image_processor(folder, recipe.image_size)
    model = AutoModelForImageClassification.from_config(recipe.config)
    start = time.perf_counter()
    train(model, *preprocess(folder, digits["train"]), recipe)
    seconds = time.perf_counter() - start
    model.save_pretrained(folder)

    saved_model = AutoModelForImageClassification.from_pretrained(folder)
    top1 = top1_accuracy(saved_model, *preprocess(folder, digits["test"]))
    parameters = saved_model.num_parameters()
    print(f"{recipe.title}: {parameters} parameters, trained in {seconds:.0f} s, test top-1 {top1:.2%}")
    return Result(recipe, parameters, top1)


README = """# Embedded demo: two small models and their data

The files here let the package show what it does without a download. They are ordinary `transformers` checkpoints and
an ordinary `datasets` parquet folder, so the demo takes the same route as your own checkpoint and data.

| Folder | What it is | Parameters | Test top-1 |
| --- | --- | ---: | ---: |
{rows}

Top-1 is measured on the {test_size} images of the test split, where one image is {one_image:.2f} percentage points.
The models were trained on the {train_size} images of the train split only. The split is random within each class,
with a fixed seed, so the same writers may appear in both parts. The models are small on purpose, and trained with
weight decay, so that a pruning mask alone visibly costs them accuracy.

`digits` holds the data as `train.parquet` and `test.parquet`, with the columns `image` (8x8 grey PNG) and `label`
(0 to 9). Each image processor upscales the images, given as RGB, to the input size of its model.

All of it, this file too, is made by this command, run from the repository root:

    python examples/train_digits.py

## Source and licence of the data

"Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
<https://doi.org/10.24432/C50P49>, licence CC BY 4.0 (<https://creativecommons.org/licenses/by/4.0/>), as bundled with
scikit-learn (`sklearn.datasets.load_digits`). Changes made: the pixel values 0 to 16 are scaled to 0 to 255 and
stored as PNG, and the images are split into a train and a test part.
"""


def write_readme(output: Path, results: list[Result], digits: DatasetDict) -> None:
    """Write the README of the output folder with the measured accuracies."""
    rows = [
        f"| `{result.recipe.folder}` | {result.recipe.title}, input {result.recipe.image_size}x"
        f"{result.recipe.image_size} | {result.parameters:,} | {result.top1:.2%} |"
        for result in results
    ]
    train_size, test_size = len(digits["train"]), len(digits["test"])
    text = README.format(
        rows="\n".join(rows), train_size=f"{train_size:,}", test_size=test_size, one_image=100 / test_size
    )
    (output / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Write the data, train both models, and write the README."""
    parser = argparse.ArgumentParser(description="Train the two small models of the embedded demo.")
    parser.add_argument("--output", type=Path, default=Path("src/snows_hf/embedded"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (the data split has its own)")
    args = parser.parse_args()

    torch.set_num_threads(1)  # Quick enough for models this small, and the same sums on every run.
    write_digits(args.output / "digits")
    digits = load_dataset(str(args.output / "digits"))
    results = [build_checkpoint(args.output, recipe, digits, args.seed) for recipe in RECIPES]
    write_readme(args.output, results, digits)


if __name__ == "__main__":
    main()
