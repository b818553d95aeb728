"""What a small ResNet's features give where the transfer entries' are measured: the same source, the same ridge regression.

    python benchmarks/transfer_baseline.py [--source tinyimagenet32] [--epochs 30] [--seeds 0 1] [--data DIR] [--json FILE]

timm's ResNet-18 with a 3x3 stem (11 million parameters, as many as the finite π-nets have) is trained without augmentation, as
the entries are: SGD with momentum 0.9 and cosine schedule, batches of 128. Its features are the pooled ones that its classifier
takes; kernel (the cosine, as of a finite net), regression, and the choice of epoch and ridge are those of the
``tinyimagenet32_*`` recipes. Minutes on a GPU.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from pizoo.data import Dataset, Normalize, epoch_order
from pizoo.evaluation.accuracy import accuracy, percent, predict
from pizoo.evaluation.transfer import transfer_correct, validation_accuracies
from pizoo.files import write_json
from pizoo.functional import feature_kernel_from_postactivations
from pizoo.memory import choose_device
from pizoo.models.base import batched
from pizoo.recipes import load_recipe
from pizoo.training.report import commit, hardware

BATCH, LR, MOMENTUM, WEIGHT_DECAY = 128, 0.1, 0.9, 5e-4
MEASURED_EVERY = 5  # epochs


def resnet(classes: int) -> nn.Module:
    net = timm.create_model("resnet18", num_classes=classes)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()  # 32 x 32 pixels are few
    return net.to(memory_format=torch.channels_last)


def featured(net: nn.Module, target: Dataset, normalize: Normalize, device: torch.device) -> Dataset:
    def of(x: Tensor) -> Tensor:
        x = normalize(x.to(device)).to(memory_format=torch.channels_last)
        return net.forward_head(net.forward_features(x), pre_logits=True)

    net.eval()
    parts = {key: batched(of, getattr(target, key), 1000).double() for key in ("train_x", "test_x")}
    return replace(target, **parts, source="")


def train_epoch(
    net: nn.Module, optimizer, schedule, x: Tensor, y: Tensor, order: Tensor, normalize: Normalize
) -> float:
    """Mean loss."""
    net.train()
    total = torch.zeros((), device=x.device)
    for batch in order.split(BATCH):
        inputs = normalize(x[batch]).to(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(net(inputs), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.detach() * len(batch)
    return (total / len(order)).item()


def run(entry: str, seed: int, epochs: int, data_dir: Path | None, device: torch.device) -> dict:
    recipe = load_recipe(entry)
    source, target = recipe.load_data(data_dir)
    normalize, transfer = recipe.data.normalize, recipe.transfer
    torch.manual_seed(seed)
    net = resnet(source.classes).to(device)
    x, y = source.train_x.to(device), source.train_y.to(device)
    optimizer = torch.optim.SGD(net.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    begin, seconds, best = time.perf_counter(), 0.0, {"validation_accuracy": -1.0}
    for epoch in range(1, epochs + 1):
        loss = train_epoch(net, optimizer, schedule, x, y, epoch_order(len(x), seed, epoch - 1).to(device), normalize)
        if epoch % MEASURED_EVERY and epoch < epochs:
            continue
        seconds += time.perf_counter() - begin
        features = featured(net, target, transfer.data.normalize, device)
        found = validation_accuracies(
            feature_kernel_from_postactivations, features, transfer.ridges, transfer.validation
        )
        accuracy_there, ridge = max(zip(found, transfer.ridges, strict=True), key=lambda one: one[0])
        print(
            f"seed {seed} epoch {epoch}: loss {loss:.3f}, held-out {accuracy_there:.2f} (ridge {ridge:g})", flush=True
        )
        if accuracy_there > best["validation_accuracy"]:
            best = {"epoch": epoch, "ridge": ridge, "validation_accuracy": accuracy_there}
            chosen = features
        begin = time.perf_counter()
    right = transfer_correct(feature_kernel_from_postactivations, chosen, [best["ridge"]])[0]
    logits = predict(net, source.test_x, normalize)
    return {
        "seed": seed,
        "accuracy": percent(right),
        **best,
        "source_accuracy": accuracy(logits, source.test_y),
        "train_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=("tinyimagenet32", "imagenet32"), default="tinyimagenet32")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = choose_device(args.device)
    entry = f"{args.source}_mu"  # whose data and regression are those of all entries
    runs = [run(entry, seed, args.epochs, args.data, device) for seed in args.seeds]
    report = {"net": "timm resnet18, 3x3 stem", "epochs": args.epochs, "hardware": hardware(device), "commit": commit()}
    report |= {"source": args.source, "seeds": runs}
    print(json.dumps(report, indent=1))
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    main()
