"""Corrupt checkpoints and load them, and hand hostile pickles to the converter: what comes of it, by kind.

    python benchmarks/fuzz.py [--cases 2000] [--seed 0] [--json FILE]

The kinds are in ``tests/corrupt.py`` and ``tests/hostile.py``; the tests run a sample of the first and all of the second. Exits
with 1 when anything but a message, or the same net to the bit, comes of one. Needs Linux, and a minute.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import corrupt
import hostile
from memory import forget_peak, peak

from pizoo.training.report import commit


def checkpoints(cases: int, seed: int, folder: Path) -> tuple[dict, bool]:
    """Outcomes of ``cases`` corrupted checkpoints, counted by kind, and whether all were good."""
    made = corrupt.subjects(folder / "whole")
    counts: dict[str, Counter] = defaultdict(Counter)
    before, begin, slowest = forget_peak(), time.perf_counter(), 0.0
    last = begin
    for kind, subject, outcome in corrupt.fuzz(cases, made, folder / "corrupted", seed):
        counts[kind][outcome] += 1
        slowest, last = max(slowest, time.perf_counter() - last), time.perf_counter()
        if outcome not in corrupt.GOOD:
            print(f"{kind}, {subject.name}: {outcome}", flush=True)
    totals = sum(counts.values(), Counter())
    report = {
        "cases": cases,
        "seed": seed,
        "checkpoints": [subject.name for subject in made],
        "outcomes": dict(totals.most_common()),
        "by_kind": {kind: dict(found.most_common()) for kind, found in counts.items()},
        "seconds": last - begin,
        "slowest_seconds": slowest,
        "memory_bytes": peak() - before,
    }
    return report, set(totals) <= set(corrupt.GOOD)


def pickles(folder: Path) -> tuple[dict, bool]:
    """What Python and what the converter make of the hostile files."""
    folder.mkdir()
    written = hostile.write(folder)
    executed = hostile.executed_by_python(folder)
    outcomes, memory = hostile.converted_by_pizoo(folder)
    refused = [stem for stem in written if outcomes[stem][0].startswith(str(folder))]
    marked = (folder / "marker").is_symlink() or (folder / "marker").exists()
    for stem in written.keys() - set(refused):
        print(f"{written[stem].name}: {outcomes[stem][0]}", flush=True)
    report = {
        "files": len(written),
        "executed_when_python_loads_them": len(executed),
        "executed_by_pizoo": int(marked),
        "refused_with_a_message": len(refused),
        "slowest_seconds": max(seconds for _, seconds in outcomes.values()),
        "memory_bytes": memory,
    }
    return report, not marked and len(refused) == len(written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {"command": " ".join(["python", *sys.argv]), "commit": commit()}
    report |= {"torch": torch.__version__, "python": platform.python_version()}
    with tempfile.TemporaryDirectory() as folder:
        report["corrupted_checkpoints"], fine = checkpoints(args.cases, args.seed, Path(folder))
        report["hostile_files"], refused = pickles(Path(folder) / "hostile")
    for part in ("corrupted_checkpoints", "hostile_files"):
        print(json.dumps({key: value for key, value in report[part].items() if key != "by_kind"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(not (fine and refused))


if __name__ == "__main__":
    main()
