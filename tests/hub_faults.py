"""What can go wrong between a machine and the Hub, and what must hold after it: shared by the tests and the benchmark."""

from __future__ import annotations

import loopback_hub  # isort: skip (before anything imports huggingface_hub)

import hashlib
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars

import pizoo
from pizoo import checkpoint, segments, zoo
from pizoo.files import CheckpointError, sha256
from pizoo.models import InfPiMLP
from pizoo.rows import growing_layers

REPO = "me/digits-infpi"
ADDRESS = f"hf-hub:{REPO}"
ENTRY = "digits_infpi"
EPOCHS = 3
LONGEST_WAIT = 0.005  # seconds; the client's own between tries are of seconds


class Scene:
    """A user of an empty loopback Hub: logged in, with an empty cache and no patience between tries."""

    def __init__(self, hub: loopback_hub.LoopbackHub, folder: Path):
        self.hub, self.folder = hub, folder
        self.cache = folder / "cache"

    def __enter__(self) -> Scene:
        (self.folder / "there").mkdir()
        self.hub.reset(self.folder / "there")
        disable_progress_bars()
        sleep = time.sleep
        self.patches = ExitStack()
        self.patches.enter_context(patch.object(time, "sleep", lambda seconds: sleep(min(seconds, LONGEST_WAIT))))
        self.patches.enter_context(patch.object(constants, "HF_HUB_CACHE", str(self.cache)))
        self.patches.enter_context(patch.dict(os.environ, {"HF_TOKEN": loopback_hub.TOKEN}))
        self.patches.enter_context(patch.dict(os.environ))
        os.environ.pop("PIZOO_HUB", None)
        return self

    def __exit__(self, *exception: object) -> None:
        self.patches.close()

    @contextmanager
    def offline(self) -> Iterator[None]:
        with patch.object(constants, "HF_HUB_OFFLINE", True):
            yield

    @contextmanager
    def stranger(self, token: str | None = None) -> Iterator[None]:
        """Nobody is logged in, or somebody the Hub does not know."""
        with patch.dict(os.environ), patch.object(constants, "HF_TOKEN_PATH", str(self.folder / "no token")):
            os.environ.pop("HF_TOKEN")
            if token is not None:
                os.environ["HF_TOKEN"] = token
            yield

    def forget(self) -> None:
        """Empty the cache."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def training(self) -> Path:
        """A training of a small net with a segment an epoch; its outputs depend on all of them."""
        folder = self.folder / "training"
        if not folder.exists():
            make_training(folder, EPOCHS, rows=20, r=8)
        return folder

    def copy(self, entry: str = ENTRY) -> Path:
        """An entry's card, to be damaged."""
        shutil.copytree(zoo.card(entry), self.folder / entry)
        return self.folder / entry

    def remove(self, pattern: str) -> None:
        """Take files out of the repository, as somebody's later commit would."""
        files = {name: file for name, file in self.hub.files(REPO).items() if not re.search(pattern, name)}
        assert len(files) < len(self.hub.files(REPO))
        self.hub.commit(REPO, "main", files)

    def damaged_blobs(self) -> list[str]:
        """Files of the cache that are not what they are called; those called incomplete are none that anybody loads."""
        found = []
        for path in self.cache.glob("models--*/blobs/*"):
            if path.suffix == ".incomplete":
                continue
            content = path.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if path.name not in (git, hashlib.sha256(content).hexdigest()):
                found.append(path.name)
        return found


def make_training(folder: Path, epochs: int, rows: int, r: int, d_in: int = 64, classes: int = 10) -> None:
    """A training checkpoint with random rows: ``rows`` more in each growing layer an epoch."""
    torch.manual_seed(0)
    net = InfPiMLP(d_in, classes, r, rows_dtype=torch.float16)
    layers = growing_layers(net)
    for layer in layers.values():
        layer.reserve(layer.count + epochs * rows)
    segments.start_training(folder, net, {"architecture": None, "num_classes": classes})
    for epoch in range(1, epochs + 1):
        for layer in layers.values():
            A = torch.randn(rows, layer.A.shape[1])
            B = torch.nn.functional.normalize(torch.randn(rows, r))
            layer.append(A, B, torch.full((rows,), 0.01))
        segments.save_epoch(folder, net, {"epoch": epoch, "step": epoch}, {})


# ---------------------------------------------------------------------------------------------------- faults


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        direction: while "publish"ing or while "load"ing.
        begin: what the scene is like before; returns what goes wrong, which ends with its context.
        says: what the user must read, a regular expression; None: the user sees nothing, the work is done.
        source: what is published: the entry, or a training.
    """

    name: str
    direction: str
    begin: Callable[[Scene], AbstractContextManager]
    says: str | None
    source: str = "entry"


def once(pattern: str, what, **headers: str) -> Callable[[Scene], AbstractContextManager]:
    def begin(scene: Scene) -> AbstractContextManager:
        scene.hub.fail(pattern, what, **headers)
        return nullcontext()

    return begin


def always(pattern: str, what, **headers: str) -> Callable[[Scene], AbstractContextManager]:
    return lambda scene: scene.hub.failing(pattern, what, **headers)


def vanish(hub: loopback_hub.LoopbackHub) -> None:
    hub.repositories.pop(REPO, None)


@contextmanager
def vanished(scene: Scene) -> Iterator[None]:
    held = scene.hub.repositories.pop(REPO)
    yield
    scene.hub.repositories[REPO] = held


@contextmanager
def vanishing(scene: Scene) -> Iterator[None]:
    held = scene.hub.repositories[REPO]
    scene.hub.fail(r"HEAD .*model\.safetensors", vanish)
    yield
    scene.hub.repositories[REPO] = held


def segment_missing(scene: Scene) -> AbstractContextManager:
    return _without(scene, r"rows-00002")


def file_missing(scene: Scene) -> AbstractContextManager:
    return _without(scene, r"^model\.safetensors")


@contextmanager
def _without(scene: Scene, pattern: str) -> Iterator[None]:
    files = scene.hub.files(REPO)
    scene.remove(pattern)
    yield
    scene.hub.commit(REPO, "main", files)


@contextmanager
def branch_missing(scene: Scene) -> Iterator[None]:
    branches = scene.hub.repositories[REPO].branches
    held = branches.pop("main")
    yield
    branches["main"] = held


@contextmanager
def edited_config(scene: Scene) -> Iterator[None]:
    """Somebody pushed a config.json with another hyper-parameter."""
    files = scene.hub.files(REPO)
    content = scene.hub.content(files["config.json"][0]).read_bytes()
    other = scene.hub.put(content.replace(b'"bias_alpha": 0.25', b'"bias_alpha": 0.5'))
    scene.hub.commit(REPO, "main", files | {"config.json": (other, False)})
    yield
    scene.hub.commit(REPO, "main", files)


@contextmanager
def private(scene: Scene) -> Iterator[None]:
    scene.hub.repositories[REPO].private = True
    with scene.stranger():
        yield


@contextmanager
def full_disk(scene: Scene) -> Iterator[None]:
    """The system refuses to write more than 64 KiB to a file: what a quota does, and a full disk with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def cached(scene: Scene) -> None:
    """Have it in the cache."""
    pizoo.load(ADDRESS)


def offline_with_cache(scene: Scene) -> AbstractContextManager:
    cached(scene)
    return scene.offline()


def vanished_with_cache(scene: Scene) -> AbstractContextManager:
    cached(scene)
    return vanished(scene)


@contextmanager
def spoiled_cache(scene: Scene) -> Iterator[None]:
    cached(scene)
    (blob,) = scene.cache.glob(f"models--*/blobs/{WEIGHTS}")
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    yield


WEIGHTS = sha256(zoo.card(ENTRY) / checkpoint.MODEL)
GET, PUT = f"GET /content/{WEIGHTS}", f"PUT /upload/{WEIGHTS}"
FAULTS = [
    Fault("loading: HTTP 429 once, with Retry-After", "load", once(GET, 429, **{"Retry-After": "0"}), None),
    Fault(
        "loading: HTTP 429 without end", "load", always("HEAD .*resolve", 429), "goes on asking to slow down .HTTP 429."
    ),
    Fault("loading: HTTP 500 once", "load", once("HEAD .*resolve", 500), None),
    Fault("loading: HTTP 500 without end", "load", always("HEAD .*resolve", 500), "fails .HTTP 500.*try again later"),
    Fault("loading: connection cut in the middle of the weights", "load", once(GET, "cut"), None),
    Fault("loading: connection cut again and again", "load", always(GET, "cut"), "broke off .*try again"),
    Fault(
        "loading: a byte of the weights is wrong",
        "load",
        once(GET, "damage"),
        r"model\.safetensors has SHA-256 .*recorded was.*taken out of the cache",
    ),
    Fault(
        "loading: a byte of the weights went wrong in the cache",
        "load",
        spoiled_cache,
        "SHA-256 .*taken out of the cache",
    ),
    Fault("loading: config.json was edited", "load", edited_config, "not those it was written with"),
    Fault("loading: no such repository", "load", vanished, "shows no repository me/digits-infpi .*HF_TOKEN"),
    Fault("loading: no such repository any more, but in the cache", "load", vanished_with_cache, None),
    Fault("loading: the repository vanishes between config and weights", "load", vanishing, "shows no repository"),
    Fault("loading: a private repository, without a token", "load", private, "if it is private, log in"),
    Fault("loading: a branch that does not exist", "load", branch_missing, "has no revision 'main'"),
    Fault("loading: the repository has no weights", "load", file_missing, r"model\.safetensors .*no such file"),
    Fault(
        "loading: a segment of a training is missing",
        "load",
        segment_missing,
        r"rows-00002\.safetensors .*no such file",
        "training",
    ),
    Fault("loading: offline, not in the cache", "load", Scene.offline, "not in the cache, and HF_HUB_OFFLINE is set"),
    Fault("loading: offline, in the cache", "load", offline_with_cache, None),
    Fault("loading: the disk takes no more", "load", full_disk, "the disk takes no more"),
    Fault("publishing: HTTP 429 once, with Retry-After", "publish", once(PUT, 429, **{"Retry-After": "0"}), None),
    Fault("publishing: HTTP 500 once", "publish", once(PUT, 500), None),
    Fault("publishing: HTTP 500 without end", "publish", always(PUT, 500), "sending .* fails .HTTP 500"),
    Fault("publishing: connection cut in the middle of the weights", "publish", once(PUT, "cut"), None),
    Fault("publishing: connection cut again and again", "publish", always(PUT, "cut"), "broke off .*try again"),
    Fault(
        "publishing: a byte of the weights arrives wrong", "publish", once(PUT, "damage"), "HTTP 400.*another SHA-256"
    ),
    Fault("publishing: the commit fails", "publish", once("POST .*/commit/", 500), "committing .*HTTP 500"),
    Fault(
        "publishing: the repository vanishes before the commit",
        "publish",
        once("POST .*/commit/", vanish),
        "committing .*shows no repository",
    ),
    Fault(
        "publishing: nobody is logged in", "publish", lambda scene: scene.stranger(), "nobody is logged in, .*HF_TOKEN"
    ),
    Fault(
        "publishing: a token that is not valid",
        "publish",
        lambda scene: scene.stranger("hf_no"),
        "a token that is not valid",
    ),
]


@dataclass(frozen=True)
class Outcome:
    """What came of a fault.

    Attributes:
        said: what the user read; None: nothing, the work was done.
        lost: what must not be and is: files that are visible though publishing failed, spoiled files in the cache, content sent
            twice, a second try that does not succeed or gives another net.
    """

    said: str | None
    lost: list[str]


def undergo(fault: Fault, scene: Scene) -> Outcome:
    """Publish or load while something goes wrong, look at what is left, and try again."""
    source = scene.training() if fault.source == "training" else ENTRY
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = pizoo.load(source)(x)
    lost: list[str] = []
    if fault.direction == "load":
        pizoo.publish(source, REPO)

    def work() -> None:
        if fault.direction == "publish":
            pizoo.publish(source, REPO)
            return
        with torch.no_grad():
            if not torch.equal(pizoo.load(ADDRESS)(x), wanted):
                lost.append("it loaded another net")

    with fault.begin(scene):
        planned = {planned.pattern for planned in scene.hub.faults}
        said = _message_of(work)
        if said and fault.direction == "publish":
            held = scene.hub.repositories.get(REPO)
            lost += [f"{name} is visible" for name in (scene.hub.files(REPO) if held else ())]
    lost += [f"{pattern} was never asked for: nothing went wrong" for pattern in planned - scene.hub.struck]
    scene.hub.faults.clear()
    lost += [f"{name} in the cache is damaged" for name in scene.damaged_blobs()]
    if again := _message_of(work):
        lost.append(f"the second try fails: {again}")
    scene.forget()
    with torch.no_grad():
        if not torch.equal(pizoo.load(ADDRESS)(x), wanted):
            lost.append("what was published is another net")
    lost += [f"{digest} was sent {times} times" for digest, times in scene.hub.sent.items() if times > 1]
    return Outcome(said, lost)


def _message_of(work: Callable[[], None]) -> str | None:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return None
