"""How far each criterion's masks take the layers' outputs, each with the best weights that its mask allows.

‖WX − ŴX‖²/‖WX‖² summed over the layers, X what the dense network feeds them, and the criterion's processor seconds.

    python benchmarks/layer_error.py MODEL --data FOLDER --pattern 1:4 2:4 [--images 500] [--criteria wanda obc alps]
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from snows_hf.adapters import build_chain
from snows_hf.data.images import calibration_images, open_images
from snows_hf.hub.load import load
from snows_hf.masks.choose import choose, split_by_fit
from snows_hf.masks.evidence import Evidence, matrix
from snows_hf.masks.scores.obc import damped, refit
from snows_hf.patterns import Masks, parse_pattern
from snows_hf.settings import settings_for


CRITERIA = ["magnitude", "wanda", "sparsegpt", "obc", "alps"]


def errors(evidence: Evidence, grams: dict[str, Tensor], masks: Masks) -> list[float]:
    """The relative error of every layer."""
    found = []
    for name, H in grams.items():
        W = matrix(evidence.weights[name]).double()
        both = [rows.unflatten(0, (len(H), -1)) for rows in (refit(W, H, matrix(masks[name])) - W, W)]
        over, under = (float(torch.einsum("grd,gde,gre->", rows, H, rows)) for rows in both)
        found.append(over / under)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--pattern", nargs="+", required=True)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    arguments = parser.parse_args()
    checkpoint = load(arguments.model)
    chain = build_chain(checkpoint.model.float())
    images = calibration_images(open_images(arguments.data, "train"), arguments.images, 0, checkpoint.preprocess)
    everything = {name: chain.weight(name).detach() for _, group in chain.groups() for name in group.parameters}
    name = Path(arguments.model).name
    print("| model | pattern | criterion | sum of relative errors | seconds |\n|---|---|---|---|---|")
    for text in arguments.pattern:
        pattern = parse_pattern(text)
        weights = {n: everything[n] for n in split_by_fit(everything, pattern)[0]}
        config = settings_for("standard", chain.family, text)
        evidence = Evidence(weights, pattern, config, chain, images)
        grams = {n: damped(H) for n, H in evidence.grams()}
        for mask in arguments.criteria:
            started = time.process_time()
            masks = choose(replace(evidence, config=config.updated(mask=mask))).masks
            seconds = time.process_time() - started
            print(
                f"| {name} | {text} | {mask} | {sum(errors(evidence, grams, masks)):.4f} | {seconds:.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
