"""What each of several processes does in ``test_processes``; :func:`start` starts them.

Every case runs in all processes; process 0 writes what became of each to ``FOLDER/of2.json``. In the end one of three kills
itself while it trains, and one of two stops without ending.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def start(folder: Path, world: int, device: str = "cpu") -> list[subprocess.Popen]:
    """Start ``world`` processes on this machine's CPU, or on as many of its GPUs ("cuda")."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}
    environment |= {name: str(value) for name, value in common.items()}
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), device],
            env={**environment, "RANK": str(k), "LOCAL_RANK": str(k)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k in range(world)
    ]


def main(folder: Path, device: str) -> None:
    import torch

    from pizoo import processes

    torch.set_num_threads(1)
    processes.BEAT, processes.MISSED_AFTER = 0.2, 2.0 if device == "cpu" else 20.0
    processes.join(torch.device(device))
    told = {}
    for name, case in (cases(folder) if device == "cpu" else trainings(folder, device)).items():
        try:
            case()
            outcome = ""
        except Exception:
            outcome = traceback.format_exc()
        told[name] = "\n".join(filter(None, processes.gathered(outcome)))
    if processes.index() == 0:
        (folder / f"of{processes.count()}.json").write_text(json.dumps(told))
    end(folder, device)


def trainings(folder: Path, device: str) -> dict[str, Callable[[], None]]:
    from test_processes import on

    from pizoo import processes
    from pizoo.recipes import load_recipe
    from pizoo.training.train import train

    def training(name: str) -> None:
        entry, overrides, engine = on(device)[name]
        out = folder / f"{name}, {processes.count()}"
        result = train(load_recipe(entry, overrides), out, device=device, engine=engine)
        assert result.results["processes"] == processes.count()

    return {name: lambda name=name: training(name) for name in on(device)}


def cases(folder: Path) -> dict[str, Callable[[], None]]:
    import test_golden
    import torch
    from test_meta import made_up_pools, small

    from pizoo import processes
    from pizoo.models import InfPiMLP
    from pizoo.training.train import train

    world, own_state, own_net = processes.count(), InfPiMLP.state_dict, test_golden.Golden.infinite_net

    def whole_state(net: InfPiMLP) -> dict[str, torch.Tensor]:
        state = {name: param.detach() for name, param in net.named_parameters()}
        for name, layer in net.growing_layers.items():
            state[f"{name}.amult"] = layer.gathered(layer.amult)
            for part in ("A", "B"):
                columns = state[f"{name}.{part}"].T
                state[f"{name}.{part}"] = torch.stack([layer.gathered(column) for column in columns], 1)
        return state

    def shared_net(golden: test_golden.Golden, prefix: str) -> InfPiMLP:
        net = own_net(golden, prefix)
        for layer in net.growing_layers.values():
            layer.share_rows()
        return net

    def golden(path: Path) -> None:
        follows = test_golden.test_training_an_infinite_net_follows_the_reference
        if path.stem.startswith("maml"):
            follows = test_golden.test_few_shot_training_follows_the_reference
        InfPiMLP.state_dict, test_golden.Golden.infinite_net = whole_state, shared_net
        try:
            follows(path, torch.float64)
        finally:
            InfPiMLP.state_dict, test_golden.Golden.infinite_net = own_state, own_net

    def tasks() -> None:
        recipe = small("infpi", "train.dtype=float64")
        train(recipe, folder / f"tasks, {world}", dataset=made_up_pools(), device="cpu", engine=True)

    paths = [path for path in sorted(test_golden.GOLDEN.glob("*.npz")) if path.stem.startswith(("infpi", "maml"))]
    found = {path.stem: lambda path=path: golden(path) for path in paths if "finite" not in path.stem}
    found |= trainings(folder, "cpu") | {"tasks": tasks}
    return found | ({"refused": lambda: refused(folder), "evaluate": lambda: evaluate(folder)} if world == 2 else {})


def refused(folder: Path) -> None:
    """What several processes cannot do together is said in all of them, before anything is written."""
    import pytest
    from test_meta import made_up_pools, small

    from pizoo import processes
    from pizoo.data import Dataset
    from pizoo.recipes import RecipeError, load_recipe
    from pizoo.training.train import train

    own = processes.index()
    with pytest.raises(ValueError, match="recipe of process 1 is not that of process 0"):
        train(load_recipe("digits_infpi", [f"train.seed={own}"]), folder / "refused", device="cpu")
    recipe = load_recipe("digits_infpi")
    data = recipe.data.load()
    other = data.train_x.clone()
    other[0, 0] += own
    parts = (other, data.train_y, data.test_x, data.test_y, data.class_names)
    with pytest.raises(ValueError, match="data of process 1 is not that of process 0"):
        train(recipe, folder / "refused", dataset=Dataset("digits", *parts), device="cpu")
    with pytest.raises(RecipeError, match="the engine cannot train this recipe: a finite net in several processes"):
        train(load_recipe("digits_finpi"), device="cpu", engine=True)
    with pytest.raises(RecipeError, match="digits_nngp is a kernel"):
        train(load_recipe("digits_nngp"), device="cpu")
    with pytest.raises(RecipeError, match="tasks are not split over processes"):
        train(small("mu"), dataset=made_up_pools(), device="cpu")
    net = train(load_recipe("digits_infpi", ["train.epochs=1", "data.subset=40", "model.r=8"]), device="cpu").model
    held = (8 + 40) // 2
    assert [len(layer.A) for layer in net.growing_layers.values()] == [held] * 2
    with pytest.raises(RuntimeError, match=f"holds {held} of its 48 rows"):
        net.state_dict()
    with pytest.raises(RuntimeError, match="holds share"):
        net.output.share_rows()
    assert not (folder / "refused").exists()


def evaluate(folder: Path) -> None:
    """Each computes half of the images, and both have the accuracy of all."""
    import torch

    import pizoo
    from pizoo import processes
    from pizoo.evaluation.features import features
    from pizoo.models import InfPiMLP

    seen, forward = [], InfPiMLP.forward
    InfPiMLP.forward = lambda net, x: seen.append(len(x)) or forward(net, x)
    try:
        found = pizoo.evaluate(folder / "infinite, 2", device="cpu")
    finally:
        InfPiMLP.forward = forward
    assert sum(processes.gathered(sum(seen))) == found["images"] and abs(2 * sum(seen) - found["images"]) <= 1
    net = pizoo.load(folder / "infinite, 2", dtype=torch.float64)
    x = processes.of_first(torch.rand(5, 64, dtype=torch.float64))
    assert torch.allclose(features(net, x), net.features(x), rtol=1e-12, atol=1e-15)
    if processes.index() == 0:
        (folder / "accuracy.json").write_text(json.dumps(found["accuracy"]))


def end(folder: Path, device: str) -> None:
    """On CPUs, of three processes 1 is killed in its third epoch; two go on to the end, and of another training process 1 is
    stopped. On GPUs, process 1 is killed."""
    from test_processes import on

    from pizoo import cli, processes
    from pizoo.training.supervised import Training

    epoch, resumes = Training._epoch, (device, processes.count()) == ("cpu", 2)
    entry, overrides, _ = on(device)["momentum" if device == "cpu" else "infinite"]
    common = ("train", entry, *(part for one in overrides for part in ("--set", one)), "--device", device, "--out")

    def struck(training: Training, number: int, bar: object) -> dict:
        if number == 2 and processes.index() == 1:
            training.writing.wait()
            os.kill(os.getpid(), signal.SIGSTOP if resumes else signal.SIGKILL)
        return epoch(training, number, bar)

    if resumes:
        run(cli, *common, str(folder / "killed"))
    Training._epoch = struck
    run(cli, *common, str(folder / ("stopped" if resumes else "killed")))


def run(cli, *arguments: str) -> None:
    """``pizoo ARGUMENTS...`` in this process, which it ends only where it fails."""
    sys.argv = ["pizoo", *arguments]
    cli.app.registered_callback.result_callback = None
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
