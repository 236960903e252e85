"""What pruning does to features: linear probes of a dense backbone, of its mask alone, and of what SNOWS makes of it.

    python examples/linear_probe.py --model timm/vit_base_patch16_224.augreg2_in21k_ft_in1k --output probes

prunes to 2:4 on calibration images of the model's own task, fits a linear classifier for other classes (CIFAR-100) on
the frozen features of all three, and prints what each reaches.
"""

import argparse
from pathlib import Path

import snows_hf


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True, help="Hub id or folder")
parser.add_argument("--pattern", default="2:4")
parser.add_argument("--calibration", default="timm/mini-imagenet", help="images of the model's own task")
parser.add_argument("--data", default="uoft-cs/cifar100", help="labelled images of the classes to transfer to")
parser.add_argument("--output", type=Path, required=True, help="folder for the two pruned models")
args = parser.parse_args()

mask, pruned = args.output / "mask", args.output / "snows"
if not mask.exists():
    snows_hf.prune(args.model, args.pattern, data=args.calibration, output=mask, update=False, on_stage=print)
if not pruned.exists():
    snows_hf.prune(args.model, args.pattern, data=args.calibration, output=pruned, on_stage=print)

result = snows_hf.probe([args.model, str(mask), str(pruned)], args.data, on_stage=print)
for name, row in zip(("dense", "mask alone", "SNOWS"), result["models"], strict=True):
    low, high = row["interval"]
    print(f"{name:10}  top-1 {row['top1']:.2f} %  (95 %: {low:.2f} to {high:.2f})")
