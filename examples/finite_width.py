"""Finite π-nets approach the infinite one they are sampled from, before and during training: loss curves and logits.

    python examples/finite_width.py [--widths 500 2000 10000] [--steps 150] [--out FILE.png]

All nets see the same batches of scikit-learn's digits. The infinite net trains by appending rows, the samples by SGD with
projected gradients. Takes about two minutes on two CPU cores; needs matplotlib.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import nn

from pizoo.data import Normalize, epoch_order, load_dataset
from pizoo.models import InfPiMLP
from pizoo.optim import PiSGD, clip_grad_norm_, param_groups

LR, CLIP, BATCH = 0.2, 1.0, 16


def train(net: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> list[float]:
    """Loss at each step."""
    optimizer = PiSGD(param_groups(net, LR), LR)
    order = torch.cat([epoch_order(len(x), 0, epoch) for epoch in range(1 + steps * BATCH // len(x))])
    losses = []
    for batch in order.split(BATCH)[:steps]:
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(net, CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[500, 2000, 10_000])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"), help="(beside this script)")
    args = parser.parse_args()

    data, normalize = load_dataset("digits"), Normalize(16.0, (0.305,), (0.376,))
    x, test_x = normalize(data.train_x).flatten(1), normalize(data.test_x).flatten(1)
    torch.manual_seed(0)
    infinite = InfPiMLP(d_in=64, d_out=10, r=32, bias_alpha=0.5)
    nets = {f"width {width:,}": copy.deepcopy(infinite).sample(width) for width in args.widths}
    curves = {"infinite": train(infinite, x, data.train_y, args.steps)}
    with torch.no_grad():
        wanted = infinite.eval()(test_x)
    errors = {}
    for (name, net), width in zip(nets.items(), args.widths, strict=True):
        curves[name] = train(net, x, data.train_y, args.steps)
        with torch.no_grad():
            errors[width] = ((net(test_x) - wanted).norm() / wanted.norm()).item()
        print(f"{name}: logits on the test images {100 * errors[width]:.1f} % from the infinite net's")
    plot(curves, errors, args.out)


def plot(curves: dict[str, list[float]], errors: dict[int, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, losses in curves.items():
        # Wide, and under the others: the widest net's curve lies on it.
        style = {"color": "silver", "linewidth": 5} if name == "infinite" else {"linewidth": 1.2}
        smooth = torch.tensor(losses).unfold(0, 5, 1).mean(1)
        left.plot(range(2, 2 + len(smooth)), smooth, label=name, **style)
    left.set(xlabel="step", ylabel="training loss (mean of 5 steps)", title="The same batches, the same curve")
    left.legend(frameon=False)
    widths = sorted(errors)
    right.loglog(widths, [errors[w] for w in widths], "o-", label="after training")
    right.loglog(widths, [errors[widths[0]] * (widths[0] / w) ** 0.5 for w in widths], "k:", label="$n^{-1/2}$")
    right.set(xlabel="width n", ylabel="relative distance of test logits", title="Distance from the infinite net")
    right.legend(frameon=False)
    right.set_xticks(widths, [f"{width:,}" for width in widths])
    right.xaxis.minorticks_off()
    for each in (right.yaxis.set_major_formatter, right.yaxis.set_minor_formatter):
        each("{x:g}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
