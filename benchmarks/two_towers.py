"""CLIP and SigLIP at full size (ViT-B/16), random weights: what a prune of the image tower does to the rest.

Everything is done by the commands that a user has; the result is loaded by transformers in a process of its own.

    python benchmarks/two_towers.py --data FOLDER --work FOLDER [--only clip|siglip]
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors


SETTINGS = ("samples=16", "batch_size=8", "k=1", "layer_steps=1", "cg_max_iter=2")
STOCK = """
import sys, torch, transformers
assert "snows_hf" not in sys.modules
model = transformers.AutoModel.from_pretrained(sys.argv[1]).eval()
processor = transformers.AutoImageProcessor.from_pretrained(sys.argv[1])
torch.manual_seed(0)
images = torch.randn(2, 3, 224, 224)
print(type(model).__name__, float(model.get_image_features(pixel_values=images).pooler_output.norm()))
"""


def clip() -> tuple[Any, Any]:
    config = tf.CLIPConfig(vision_config={"patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12})
    return tf.CLIPModel(config), tf.CLIPImageProcessor()


def siglip() -> tuple[Any, Any]:
    return tf.SiglipModel(tf.SiglipConfig()), tf.SiglipImageProcessor(size={"height": 224, "width": 224})


def tokenizer(length: int) -> Any:
    """Letters and digits, between a beginning and an end, as many as the text tower takes."""
    words = ["<pad>", "<start>", "<end>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789.,"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=length, **special)


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])}: {done.stderr[-2000:]}")
    return done.stdout


def show(name: str, data: str, work: Path) -> None:
    dense, sparse = work / name, work / f"{name}-2to4"
    torch.manual_seed(0)
    model, processor = {"clip": clip, "siglip": siglip}[name]()
    for part in (model, processor, tokenizer(model.config.text_config.max_position_embeddings)):
        part.save_pretrained(dense)
    settings = [argument for setting in SETTINGS for argument in ("--set", setting)]
    given = ["--pattern", "2:4", "--mask", "magnitude", "--data", data, "--output", str(sparse), "--quiet", *settings]
    run("-m", "snows_hf", "prune", str(dense), *given)
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, sparse))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    towers = {key.split(".")[0] for key in changed}
    zeros = sum(int((after[key] == 0).sum()) for key in changed) / sum(after[key].numel() for key in changed)
    text = sum(key.startswith("text_model") for key in before)
    print(f"{type(model).__name__}: {len(changed)} of {len(before)} tensors changed, all of {sorted(towers)};")
    print(f"  zeros in them {zeros:.4f}; the text tower's {text} are the same bit for bit")
    print("  stock transformers:", run("-c", STOCK, str(sparse)).strip())
    print("  zero-shot:", run("-m", "snows_hf", "eval", str(sparse), "--data", data, "--prompt", "a {}.").strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="images with named classes")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--only", choices=("clip", "siglip"))
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else ["clip", "siglip"]:
        show(name, arguments.data, arguments.work)


if __name__ == "__main__":
    main()
