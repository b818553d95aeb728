"""How the kernel of a π-net's features moves while it trains, beside the frozen NNGP and NTK: alignments and spectra.

    python examples/moving_kernel.py [--entry digits_infpi] [--run FOLDER] [--images 1000] [--out FILE.png]

Trains the entry into the folder, unless it holds the training already, and takes the nets of its epochs from there: an infinite
net's are prefixes of one list of rows. On the digits it takes under a minute on two CPU cores. With `--entry cifar10_infpi
--run FOLDER`, the folder of a `pizoo train cifar10_infpi`, it draws the same of CIFAR-10. Kernels are on test images, which the
net was not trained on. Needs matplotlib.

An alignment is the cosine between two kernels with their rows and columns centred (Cortes, Mohri, Rostamizadeh 2012): 1 for the
same kernel. Beside it, what the kernels are good for: ridge regression from each half of these images to the other.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import pizoo
from pizoo import checkpoint, functional, segments
from pizoo.config import read_config
from pizoo.evaluation.accuracy import accuracy
from pizoo.memory import choose_device
from pizoo.recipes import Recipe, load_recipe

DEPTH, RIDGE = 2, 1e-3
EPOCHS_SHOWN = 12


def centred(kernel: Tensor) -> Tensor:
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def alignment(a: Tensor, b: Tensor) -> float:
    a, b = centred(a), centred(b)
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def spectrum(kernel: Tensor) -> Tensor:
    """Eigenvalues of the centred kernel, largest first, as shares of their sum."""
    values = torch.linalg.eigvalsh(centred(kernel)).flip(0).clamp(min=0)
    return values / values.sum()


def regression(kernel: Tensor, y: Tensor, classes: int) -> float:
    """Accuracy in percent of ridge regression from each half of the images to the other; the kernel is scaled to trace n."""
    kernel, half = kernel / kernel.diagonal().mean(), len(y) // 2
    scores = torch.empty(len(y), classes, dtype=kernel.dtype)
    for known, asked in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        targets = functional.centred_one_hot(y[known], classes)
        scores[asked] = kernel[asked, known] @ functional.solve_ridge(kernel[known, known], targets, RIDGE)
    return accuracy(scores, y)


def feature_kernels(folder: Path, x: Tensor, device: torch.device) -> dict[int, Tensor]:
    """The kernel of the features before training (epoch 0) and after every epoch that is held, or some dozen of them."""
    recipe = Recipe.from_dict(read_config(folder)["recipe"])
    held = [record["epoch"] for record in segments.read_manifest(folder)["epochs"] if record["state"]]
    chosen = sorted({*held[:2], *held[:: max(1, len(held) // EPOCHS_SHOWN)], held[-1]})
    kernels = {}
    for epoch in (0, *chosen):
        net = pizoo.load(folder, epoch=epoch, device=device) if epoch else recipe.build_model(device)
        kernels[epoch] = pizoo.feature_kernel(net, x, dtype=torch.float64).cpu()
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entry", default="digits_infpi")
    parser.add_argument("--run", type=Path, help="folder of the training (a temporary one)")
    parser.add_argument("--data", type=Path, help="folder of data sets")
    parser.add_argument("--images", type=int, default=1000, help="test images to compute kernels on, at most")
    parser.add_argument("--device", help="cpu or cuda (a GPU if there is one)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"), help="(beside this script)")
    args = parser.parse_args()

    device, recipe = choose_device(args.device), load_recipe(args.entry)
    data = recipe.data.load(args.data)
    x, y = recipe.data.normalize(data.test_x[: args.images]), data.test_y[: args.images]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.run or Path(scratch)
        if not (folder / checkpoint.RESULTS).exists():
            print(f"training {args.entry}", flush=True)
            pizoo.train(recipe, folder, data_dir=args.data, device=device)
        moving = feature_kernels(folder, x, device)
    inputs = x.flatten(1).double()
    frozen = {
        "NNGP": functional.nngp(inputs, inputs, DEPTH),
        "NTK": functional.ntk(inputs, inputs, DEPTH, form="textbook"),
    }
    labels = functional.centred_one_hot(y, data.classes)
    compared = {"features before training": moving[0], **frozen, "labels": labels @ labels.T}
    alignments = {name: [alignment(K, other) for K in moving.values()] for name, other in compared.items()}
    accuracies = [regression(K, y, data.classes) for K in moving.values()]
    levels = {name: regression(K, y, data.classes) for name, K in frozen.items()}
    first, last = min(moving), max(moving)
    for epoch in (first, last):
        at = list(moving).index(epoch)
        told = ", ".join(f"{name} {values[at]:.3f}" for name, values in alignments.items())
        print(f"epoch {epoch}: aligned with {told}; regression {accuracies[at]:.2f} %")
    print(", ".join(f"{name} regression {value:.2f} %" for name, value in levels.items()))
    spectra = {"features before training": moving[first], f"features after epoch {last}": moving[last], **frozen}
    plot(
        args.entry, list(moving), alignments, accuracies, levels, {k: spectrum(v) for k, v in spectra.items()}, args.out
    )


def plot(
    entry: str,
    epochs: list[int],
    alignments: dict[str, list[float]],
    accuracies: list[float],
    levels: dict[str, float],
    spectra: dict[str, Tensor],
    path: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"NNGP": "tab:orange", "NTK": "tab:green", "labels": "tab:red", "features before training": "tab:gray"}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.9), layout="constrained")
    for name, values in alignments.items():
        left.plot(epochs, values, "o-", markersize=3, linewidth=1.2, color=colours[name], label=name)
    left.set(xlabel="epoch", ylabel="alignment", title=f"{entry}: the features' kernel with …")
    middle.plot(epochs, accuracies, "o-", markersize=3, color="tab:blue", label="features")
    for i, (name, level) in enumerate(levels.items()):
        # The dashes of one lie in the gaps of the other: two kernels may score the same.
        middle.axhline(level, color=colours[name], linestyle=(6 * i, (6, 6)), linewidth=1.6, label=f"{name}, frozen")
    middle.set(xlabel="epoch", ylabel="accuracy in percent", title="Ridge regression, half to half")
    for name, values in spectra.items():
        ranks = range(1, len(values) + 1)
        right.loglog(ranks, values, linewidth=1.4, color=colours.get(name, "tab:blue"), label=name)
    right.set(xlabel="rank", ylabel="share of the trace", title="Eigenvalues", ylim=(1e-6, 1))
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
