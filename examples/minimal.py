"""A net of one's own from growing layers, trained with the ordinary loop on one's own arrays or image folder."""

import argparse

import torch
from torch import nn

from pizoo.data import Normalize, load_dataset
from pizoo.nn import InfPiInput, InfPiLinear
from pizoo.optim import PiSGD, clip_grad_norm_, param_groups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("data", nargs="?", help="an .npz or a folder of images; without it, scikit-learn's digits")
path = parser.parse_args().data

data = load_dataset("mine", path=path) if path else load_dataset("digits")
scale = float(data.train_x.max())
train_x, test_x = (Normalize(scale)(x).flatten(1) for x in (data.train_x, data.test_x))

torch.manual_seed(0)
net = nn.Sequential(
    InfPiInput(train_x.shape[1], r=50),
    InfPiLinear(50, 50),
    InfPiLinear(50, data.classes, role="readout"),
)
optimizer = PiSGD(param_groups(net, lr=0.5, last_layer_lr_mult=4.0, bias_lr_mult=0.5), lr=0.5)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
for epoch in range(5):
    net.train()
    for batch in torch.randperm(len(train_x)).split(16):
        loss = nn.functional.cross_entropy(net(train_x[batch]), data.train_y[batch])
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(net, max_norm=0.4, per_param=True)
        optimizer.step()
    schedule.step()
    net.eval()
    with torch.no_grad():
        accuracy = (net(test_x).argmax(1) == data.test_y).float().mean()
    print(f"epoch {epoch + 1}: test accuracy {100 * accuracy:.2f} %, {net[1].count} rows a layer")
