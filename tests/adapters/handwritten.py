"""Writes handwritten.json: what the hand-written adapters, which the traced chain has replaced, said of the cases.

Run in a checkout of the last commit that has them, with the cases of today:

    git worktree add ../handwritten 7dc7b1d
    PYTHONPATH=../handwritten/src:tests python tests/adapters/handwritten.py > tests/adapters/handwritten.json
"""

import json

from cases import CASES

from snows_hf.adapters import build_chain


NAMES = (
    *("transformers-vit", "timm-vit", "timm-vit-qk-norm", "transformers-deit", "transformers-dinov2"),
    *("transformers-beit-position-biases", "timm-beit", "transformers-clip", "timm-vit-clip", "transformers-siglip"),
    *("transformers-swin", "timm-swin-padded", "transformers-convnext", "timm-convnext", "timm-convnextv2"),
    *("transformers-resnet-basic", "timm-resnet-basic", "timm-resnet-bottleneck", "timm-resnext"),
    *("timm-mobilenet", "cifar-resnet8"),
)

if __name__ == "__main__":
    said = {}
    for case in CASES:
        if case.name in NAMES:
            operations = build_chain(case.model()).operations
            said[case.name] = [
                [o.name, *((o.group.name, o.group.kind, o.group.parameters) if o.group else ())] for o in operations
            ]
    lines = (
        f"{json.dumps(name)}: [\n " + ",\n ".join(map(json.dumps, operations)) + "\n]"
        for name, operations in said.items()
    )
    print("{\n" + ",\n".join(lines) + "\n}")
