"""The trajectories of the paper's reference code (``tests/golden``) are followed, in float64 to rounding and in float32."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pizoo import functional
from pizoo.models import InfPiMLP, NNGPLearner, NTKLearner
from pizoo.optim import PiSGD, clip_grad_norm_, clip_threshold, param_groups
from pizoo.training.fewshot import FewShotBatch, meta_step

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


def files(kind: str) -> pytest.MarkDecorator:
    paths = sorted(GOLDEN.glob(f"{kind}_*.npz"))
    assert paths, f"no {kind}_*.npz in {GOLDEN}"
    return pytest.mark.parametrize("path", paths, ids=[path.stem for path in paths])


class Golden:
    """One file: ``meta``, arrays as tensors (floating ones in ``dtype``), and comparison with what they should be."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float64):
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}
            self.meta: dict[str, Any] = json.loads(bytes(arrays["meta"]))
        self.dtype = dtype

    def __getitem__(self, key: str) -> Tensor:
        array = self.arrays[key]
        return array.to(self.dtype) if array.is_floating_point() else array

    def state(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{prefix}/"): self[key] for key in self.arrays if key.startswith(f"{prefix}/")}

    def check(self, name: str, found: Tensor | list, wanted: Tensor | None = None) -> None:
        wanted = self.arrays[name] if wanted is None else wanted
        found = torch.as_tensor(found, dtype=torch.float64).detach()
        assert found.shape == wanted.shape, name
        error = torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted).clamp(min=1e-300)
        assert error <= TOLERANCE[self.dtype], f"{name}: relative error {error:.1e}"

    def check_state(self, prefix: str, net: nn.Module) -> None:
        found, wanted = net.state_dict(), self.state(prefix)
        assert set(wanted) <= set(found)
        for key in wanted:
            self.check(f"{prefix}/{key}", found[key])

    def infinite_net(self, prefix: str) -> InfPiMLP:
        meta = self.meta
        d_out = meta.get("d_out") or meta["ways"]
        net = InfPiMLP(meta["d_in"], d_out, meta["r"], meta["hidden_layers"], **meta["net"], dtype=self.dtype)
        state = self.state(prefix)
        if meta["net"].get("last_bias_alpha") == 0:  # the reference keeps a bias that is multiplied by 0
            assert not state.pop("output.bias").any()
        net.load_state_dict(state)
        return net

    def loss(self, out: Tensor, batch: Tensor) -> Tensor:
        if self.meta.get("loss") == "mse":
            return nn.functional.mse_loss(out, self["Y_regression"][batch])
        return nn.functional.cross_entropy(out, self["Y"][batch])


@DTYPES
@files("infpi")
def test_training_an_infinite_net_follows_the_reference(path: Path, dtype: torch.dtype) -> None:
    golden = Golden(path, dtype)
    meta, x, x_test, batches = golden.meta, golden["X"], golden["X_test"], golden["batches"]
    net = golden.infinite_net("init")
    options = dict(meta["optimizer"])
    momentum, dampening = options.pop("momentum", 0.0), options.pop("dampening", 0.0)
    groups = param_groups(net, meta["lr"], weight_decay=options.pop("wd", 0.0), **options)
    optimizer = PiSGD(groups, meta["lr"], momentum=momentum, dampening=dampening)
    drop, ratio = meta["lr_drop"] or (math.inf, 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: ratio if step >= drop else 1.0)

    losses, norms = [], []
    for step, batch in enumerate(batches):
        loss = golden.loss(net(x[batch]), batch)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        found = clip_grad_norm_(net, None, per_param=True)
        norms.append([found[key.replace(".weight", ".A")].item() for key in meta["grad_norm_keys"]])
        clip_grad_norm_(net, clip_threshold(optimizer, meta["gclip"]), per_param=meta["gclip_per_param"])
        optimizer.step()
        schedule.step()
        for when, key in ((0, "out_after_1"), (len(batches) // 2, "out_after_half")):
            if step == when:
                golden.check(key, net(x_test))

    golden.check("losses", losses)
    golden.check("grad_norms", norms)
    golden.check("out_final", net(x_test))
    direction, norm = functional.unit(net.features(x_test))
    golden.check("feature_gbar", direction)
    golden.check("feature_s", norm)
    golden.check_state("final", net)


@DTYPES
@files("finpi")
def test_sampling_and_training_a_finite_net_follows_the_reference(path: Path, dtype: torch.dtype) -> None:
    golden = Golden(path, dtype)
    meta, x, x_test = golden.meta, golden["X"], golden["X_test"]
    net = golden.infinite_net("inf").sample(meta["width"], [golden[f"omega.{l}"] for l in range(meta["hidden_layers"])])
    net.hparams["projected"] = meta["projected"]
    golden.check_state("init", net)
    golden.check("out_init", net(x_test))

    multipliers = ("first_layer_lr_mult", "last_layer_lr_mult", "bias_lr_mult", "apply_lr_mult_to_wd")
    groups = param_groups(net, meta["lr"], weight_decay=meta["wd"], **{key: meta[key] for key in multipliers})
    optimizer = PiSGD(groups, meta["lr"])
    losses = []
    for batch in golden["batches"]:
        loss = golden.loss(net(x[batch]), batch)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        clip_grad_norm_(net, meta["gclip"], per_param=meta["gclip_per_param"])
        optimizer.step()

    golden.check("losses", losses)
    golden.check("out_final", net(x_test))
    golden.check("feature", net.features(x_test))
    golden.check_state("final", net)


@DTYPES
@files("maml")
def test_few_shot_training_follows_the_reference(path: Path, dtype: torch.dtype) -> None:
    golden = Golden(path, dtype)
    meta, x_probe = golden.meta, golden["X_probe"]
    if infinite := meta["kind"] == "inf_maml":
        net = golden.infinite_net("init")
    else:
        omegas = [golden[f"omega.{l}"] for l in range(meta["hidden_layers"])]
        net = golden.infinite_net("inf").sample(meta["width"], omegas, meta["projected"])
    multipliers = ("first_layer_lr_mult", "last_layer_lr_mult", "bias_lr_mult")
    optimizer = PiSGD(param_groups(net, meta["meta_lr"], **{key: meta[key] for key in multipliers}), meta["meta_lr"])

    results = []
    for step, meta_lr in enumerate(golden["meta_lrs"].tolist()):
        for group in optimizer.param_groups:
            group["lr"] = meta_lr
        parts = (golden[key][step] for key in ("X_support", "Y_support", "X_query", "Y_query"))
        options = {"per_param": meta["gclip_per_param"], "first_order": meta.get("first_order", False)}
        results.append(meta_step(net, optimizer, FewShotBatch(*parts), meta["step_size"], meta["gclip"], **options))

    for i, (name, unit) in enumerate((("inner_losses", 1), ("outer_losses", 1), ("accuracies", 100))):
        if name in golden.arrays:
            golden.check(name, torch.stack([result[i] for result in results]) / unit)
    golden.check("out_final", net(x_probe))
    if infinite:
        direction, norm = functional.unit(net.features(x_probe))
        golden.check("feature_gbar", direction)
        golden.check("feature_s", norm)
    # The order of rows, and support rows in one block or two, are not part of the function.
    state = {key: value for key, value in net.state_dict().items() if not key.endswith((".B", ".amult"))}
    growing = {f"{name}.A" for name in net.growing_layers} if infinite else set()
    for key in set(state) - growing - {key for key in state if key.startswith("omega.")}:
        golden.check(f"final/{key}", state[key])


@files("kernel_fewshot")
def test_kernel_learners_predict_as_the_reference_kernels_do(path: Path) -> None:
    golden = Golden(path)
    meta, x, y = golden.meta, golden["X_support"], golden["Y"]
    kind = {"nngp": NNGPLearner, "ntk": NTKLearner}[meta["kernel"]]
    learner = kind(x.shape[2], meta["ways"], meta["depth"], meta["var_w"], meta["var_b"])
    golden.check("query_logits", learner.adapt(x, y, meta["step_size"])(golden["X_query"]))
    single = learner.adapt(x[1], y[1], meta["step_size"])(golden["X_query"][1])
    golden.check("query_logits of one task", single, golden["query_logits"][1])


def kernel_named(key: str, x: Tensor, y: Tensor, var_w: float, var_b: float) -> Tensor:
    """``nngp_depth3`` or ``ntk_depth3_first0.2_last4_bias0.5`` between x and y."""
    name, depth, *multipliers = key.split("_")
    depth = int(depth.removeprefix("depth"))
    if name == "nngp":
        return functional.nngp(x, y, depth, var_w, var_b)
    words = ("first", "last", "bias")
    lr_mults = [float(part.removeprefix(word)) for part, word in zip(multipliers, words, strict=True)]
    return functional.ntk(x, y, depth, var_w, var_b, *lr_mults)


@files("kernels")
def test_nngp_and_ntk_equal_the_reference_kernels(path: Path) -> None:
    golden = Golden(path)
    x, y = golden["X"], golden["Y"]
    identical = torch.zeros(len(x), len(y), dtype=torch.bool)
    identical[range(3), range(3)] = True
    assert torch.equal(x[:3], y[:3])
    keys = [key for key in golden.arrays if key.startswith(("nngp", "ntk"))]
    assert len(keys) == 3 * len(golden.meta["depths"])
    for key in keys:
        kernel = kernel_named(key, x, y, golden.meta["var_w"], golden.meta["var_b"])
        error = (kernel / golden[key] - 1).abs()
        assert error[~identical].max() <= 1e-12, key
        assert error[identical].max() <= 1e-7, key  # acos is ill-conditioned at 1


@files("feature_kernel")
def test_feature_kernels_and_ridge_regression_equal_the_reference(path: Path) -> None:
    golden = Golden(path)
    pre, post, n = golden["preactivation"], golden["postactivation"], golden.meta["train"]
    kernel = functional.feature_kernel_from_preactivations(pre, pre)
    golden.check("kernel_infinite", kernel)
    golden.check("kernel_finite", functional.feature_kernel_from_postactivations(post, post))

    targets = functional.centred_one_hot(golden["Y"][:n], int(golden["Y"].max()) + 1)
    dual = functional.solve_ridge(kernel[:n, :n], targets, golden.meta["ridge"])
    golden.check("ridge_prediction", kernel[n:, :n] @ dual)
