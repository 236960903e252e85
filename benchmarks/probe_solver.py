"""The probe's own L-BFGS against scikit-learn's: time, objective and top-1 on the features of a backbone.

    python benchmarks/probe_solver.py MODEL --data FOLDER [--strengths 1 0.1 0.01 0.001 0.0001]

Both minimise mean cross-entropy + λ/2 ‖W‖² on the same standardised features in float32, from zero.
"""

import argparse
import time
import warnings

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from snows_hf.data.images import labelled_batches, open_images
from snows_hf.hub.load import load
from snows_hf.jobs.probe import extract_features, fit_logistic, standardisation
from snows_hf.runtime.run import Run


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model")
parser.add_argument("--data", required=True)
parser.add_argument("--strengths", type=float, nargs="+", default=[1, 1e-1, 1e-2, 1e-3, 1e-4])
args = parser.parse_args()

checkpoint = load(args.model)
splits = []
for split in ("train", "test"):
    source = open_images(args.data, split)
    batches = labelled_batches(source, checkpoint.preprocess, 256)
    splits.append(extract_features(Run(), checkpoint.model, batches, source))
(x, y), (x_test, y_test) = splits
shift, scale = standardisation(x)
x, x_test = (x - shift) / scale, (x_test - shift) / scale
classes = int(y.max()) + 1
warnings.simplefilter("ignore")  # scikit-learn warns where it stops at its limit of iterations


def describe(weight: Tensor, bias: Tensor, strength: float, started: float) -> str:
    """Time since ``started``, objective in float64, top-1."""
    seconds = time.perf_counter() - started
    weight, bias = weight.double(), bias.double()
    value = F.cross_entropy(x.double() @ weight + bias, y) + strength / 2 * weight.square().sum()
    top1 = (x_test.double() @ weight + bias).argmax(1).eq(y_test).double().mean()
    return f"{seconds:.2f} s | {float(value):.6f} | {100 * float(top1):.2f}"


fit_logistic(x, y, classes, 1.0)  # the first call loads what torch needs
print(f"{len(x)} images, {x.shape[1]} features, {classes} classes, {torch.get_num_threads()} threads")
print("| λ | torch | objective | top-1 (%) | scikit-learn | objective | top-1 (%) |\n|---|---|---|---|---|---|---|")
for strength in args.strengths:
    started = time.perf_counter()
    ours = describe(*fit_logistic(x, y, classes, strength), strength, started)
    started = time.perf_counter()
    theirs = LogisticRegression(C=1 / (len(y) * strength), tol=1e-5, max_iter=1000).fit(x.numpy(), y.numpy())
    other = describe(torch.from_numpy(theirs.coef_.T), torch.from_numpy(theirs.intercept_), strength, started)
    print(f"| {strength:g} | {ours} | {other} |")
