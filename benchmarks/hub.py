"""The Hub, on this machine: what faults do, and a large checkpoint there and back.

    python benchmarks/hub.py                    # three times 6 GB of disk, a few minutes
    python benchmarks/hub.py --gigabytes 0.5

Both go through the server of ``tests/loopback_hub.py``: plain HTTP with LFS, not Xet, and no network between.

- ``entries``: every shipped entry, published and loaded again: whether all tensors are equal to the bit.
- ``faults``: what the user read, and what was lost (nothing, or it says what).
- ``round_trip``: a training of random rows in segments of 121 MB, as large as those of ``cifar10_infpi``, published and
  fetched into an empty cache. Peak memory is that of the publishing and of the fetching process, above the most that it had
  held before, after its imports.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "hub.json"
TESTS = ROOT / "tests"
REPO = "me/large"
ROWS, RANK, INPUTS, CLASSES = 50_000, 400, 3072, 10  # of a segment: an epoch of cifar10_infpi
SEGMENT_BYTES = 2 * ROWS * (3 * RANK + CLASSES)


def faults() -> list[dict[str, Any]]:
    """Undergo every fault of the tests."""
    from hub_faults import FAULTS, Scene, undergo
    from loopback_hub import LISTENING, LoopbackHub

    table = []
    with tempfile.TemporaryDirectory() as folder:
        hub = LoopbackHub(Path(folder), LISTENING)
        for fault in FAULTS:
            with tempfile.TemporaryDirectory() as scratch, Scene(hub, Path(scratch)) as scene:
                outcome = undergo(fault, scene)
                said = outcome.said and outcome.said.replace(scratch, "…").replace(str(ROOT) + "/", "")
                said = said and said.replace(hub.endpoint, "the Hub")
            table.append({"fault": fault.name, "said": said or "nothing: the work was done", "lost": outcome.lost})
        hub.close()
    return table


def entries() -> dict[str, bool]:
    """Publish and load every shipped entry: whether it comes back to the bit."""
    import torch
    from hub_faults import Scene
    from loopback_hub import LISTENING, LoopbackHub

    import pizoo

    equal = {}
    folder, scratch = tempfile.TemporaryDirectory(), tempfile.TemporaryDirectory()
    with folder as there, scratch as here, Scene(LoopbackHub(Path(there), LISTENING), Path(here)):
        for entry in filter(pizoo.zoo.has_weights, pizoo.list_entries()):
            repo_id = f"me/{entry.replace('_', '-')}"
            pizoo.publish(entry, repo_id)
            loaded, wanted = pizoo.load(f"hf-hub:{repo_id}").state_dict(), pizoo.load(entry).state_dict()
            same = all(torch.equal(loaded[key], wanted[key]) for key in wanted) and loaded.keys() == wanted.keys()
            equal[entry] = same and pizoo.verify(f"hf-hub:{repo_id}", device="cpu", quick=True).status == "verified"
    return equal


# ---------------------------------------------------------------------------------------------------- the round trip


def generate(folder: Path, epochs: int) -> None:
    from hub_faults import make_training

    make_training(folder, epochs, ROWS, RANK, INPUTS, CLASSES)


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Wall time of ``work``, and the process's peak memory above its peak before."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds = round(time.perf_counter() - begin, 1)
    return {"seconds": seconds, "memory_before_bytes": before * 1024, "peak_memory_bytes": peak * 1024}


def publish(folder: Path) -> dict[str, Any]:
    import pizoo

    done: list[Any] = []
    first = measured(lambda: done.append(pizoo.publish(folder, REPO)))
    again = pizoo.publish(folder, REPO)
    assert again.commit == done[0].commit
    files = {"files": len(done[0].uploads), "bytes": done[0].bytes_to_send}
    return {**files, **first, "bytes_when_published_again": again.bytes_to_send}


def fetch() -> dict[str, Any]:
    from pizoo.hub import Address, fetch

    return measured(lambda: fetch(Address(REPO)))


def logits(name: str) -> list[float]:
    import torch

    import pizoo

    with torch.no_grad():
        return pizoo.load(name)(torch.randn(2, INPUTS, generator=torch.Generator().manual_seed(0))).flatten().tolist()


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """``work`` in a process of its own, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def round_trip(gigabytes: float, scratch: Path) -> dict[str, Any]:
    epochs = max(2, round(gigabytes * 1e9 / SEGMENT_BYTES))
    (scratch / "there").mkdir()
    alone(generate, scratch / "training", epochs)
    command = [sys.executable, str(TESTS / "loopback_hub.py"), str(scratch / "there")]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        os.environ |= {
            "HF_ENDPOINT": server.stdout.readline().strip(),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_loopback",
        }
        os.environ |= {"HF_HOME": str(scratch / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        published = alone(publish, scratch / "training")
        fetched = alone(fetch)
        equal = alone(logits, str(scratch / "training")) == alone(logits, f"hf-hub:{REPO}")
    finally:
        server.communicate("")
    return {
        "segments": epochs,
        "segment_bytes": SEGMENT_BYTES,
        "publish": published,
        "fetch": fetched,
        "logits_equal": equal,
        "peak_in_segments": round(max(published["peak_memory_bytes"], fetched["peak_memory_bytes"]) / SEGMENT_BYTES, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gigabytes", type=float, default=6.0, help="of rows, there and back; three times that of disk"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    free = shutil.disk_usage(scratch).free
    if free < 3.4e9 * arguments.gigabytes:
        parser.error(
            f"{scratch} has {free / 1e9:.0f} GB free; three times {arguments.gigabytes:g} GB and a tenth are needed"
        )
    sys.path.insert(0, str(TESTS))
    try:
        results = {
            "command": f"python benchmarks/hub.py --gigabytes {arguments.gigabytes:g}",
            "entries": alone(entries),
            "faults": alone(faults),
            "round_trip": round_trip(arguments.gigabytes, scratch),
        }
    finally:
        shutil.rmtree(scratch)
    import huggingface_hub

    from pizoo.files import write_json

    versions = {"huggingface_hub": huggingface_hub.__version__, "python": sys.version.split()[0]}
    write_json(arguments.out, {**results, "versions": versions})
    for fault in results["faults"]:
        print(f"{fault['fault']}\n    {fault['said']}\n    lost: {fault['lost'] or 'nothing'}")
    print(results["entries"], results["round_trip"], sep="\n")


if __name__ == "__main__":
    main()
