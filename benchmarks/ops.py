"""Time of the growing layers' ops against the number of rows, the memory limit drawn in, and their error.

    python benchmarks/ops.py [--out benchmarks/results] [--dtype int8] [--rows 50000 250000 1000000 2500000]

One step of ``cifar10_infpi`` (r = 400, batch 8, rows in float16 if not told otherwise): forward and backward of the hidden
layer (400 columns), output and Jacobian of the read-out (10 columns), replayed as one CUDA graph. The limit counts every row
read once forward and once backward at the bandwidth of a device-to-device copy measured in the same run; the Jacobian needs no
second pass. Times are medians; rows are random. Errors are relative, in norm, against float64 on the same rounded rows and
inputs, at ``ERROR_ROWS``.
Writes ``ops_<gpu>.json`` and ``ops_<gpu>.png``, of other rows than float16 ``ops_<dtype>_<gpu>``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pizoo import ops
from pizoo.functional import unit
from pizoo.ops import reference
from pizoo.rows import converted, empty_rows

RANK, BATCH, FEW_SHOT_BATCH, COLUMNS = 400, 8, 80, {"hidden": 400, "readout": 10}
CUDA = torch.device("cuda")
ERROR_ROWS, ERROR_BLOCK = 1_000_000, 50_000
PLAIN_ROWS = 1_000_000  # beyond it plain torch is not timed
SCALES = ((1.0, 1.0), (1e-6, 1.0), (4.0, 1.0), (1.0, 1e-6))  # of amult and of A
STEP = (("hidden", "forward"), ("readout", "jacobian"), ("hidden", "backward"))


class Layer(NamedTuple):
    """Random rows; ``bmult`` of int8 ones alone."""

    A: Tensor
    B: Tensor
    amult: Tensor
    bmult: Tensor | None = None

    def cut(self, rows: slice) -> Layer:
        return Layer(*(part if part is None else part[rows] for part in self))

    def options(self, count: Tensor | None = None) -> dict[str, Tensor | None]:
        return {"count": count, "bmult": self.bmult}

    @property
    def row_bytes(self) -> int:
        return sum(part.stride(0) * part.element_size() for part in self if part is not None)


def random_layer(M: int, columns: int, dtype: torch.dtype) -> Layer:
    """M rows in storage as layers reserve it."""
    A, B = (empty_rows((M, n), dtype, CUDA) for n in (columns, RANK))
    layer = Layer(A, B, torch.empty(M, device=CUDA), torch.empty(M, device=CUDA) if dtype == torch.int8 else None)
    for first in range(0, M, 1 << 18):
        block = layer.cut(slice(first, first + (1 << 18)))
        A, B, amult = (torch.randn(part.shape, device=CUDA) for part in block[:3])
        for part, new in zip(block, converted(A, unit(B)[0], amult, dtype), strict=False):
            part.copy_(new)
    return layer


def calls(name: str, layer: Layer, b: int, count: Tensor | None) -> dict[str, Callable[[], object]]:
    """The ops of one layer on random inputs and gradients."""
    gbar = unit(torch.randn(b, RANK, device=CUDA))[0]
    delta, rows, options = torch.randn(b, COLUMNS[name], device=CUDA), layer[:3], layer.options(count)
    return {
        f"{name} forward": lambda: ops.growing_forward(gbar, *rows, **options),
        f"{name} backward": lambda: ops.growing_backward(gbar, *rows, delta, **options),
        f"{name} jacobian": lambda: ops.growing_forward_jacobian(gbar, *rows, **options),
    }


def milliseconds(*functions: Callable[[], object], repeat: int = 10, rounds: int = 7) -> float:
    """Median time of running the functions one after the other, captured ``repeat`` times in one CUDA graph."""
    for function in functions:
        function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for function in functions:
                function()
    return eager_milliseconds(graph.replay, rounds=rounds) / repeat


def eager_milliseconds(function: Callable[[], object], rounds: int = 7) -> float:
    """Median time of one call, between device events, after two calls to warm up."""
    times = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def errors(dtype: torch.dtype) -> list[dict]:
    """Relative error of every op, over scales of amult and of A."""
    results = []
    for amult_scale, A_scale in SCALES:
        for name, columns in COLUMNS.items():
            layer = random_layer(ERROR_ROWS, columns, dtype)
            if dtype != torch.int8:  # whose scale is part of amult
                layer = layer._replace(A=(layer.A.float() * A_scale).to(dtype))
            layer = layer._replace(amult=layer.amult * amult_scale)
            A, B, amult, _ = layer
            gbar, delta = unit(torch.randn(BATCH, RANK, device=CUDA))[0], torch.randn(BATCH, columns, device=CUDA)
            found = {"forward": (ops.growing_forward(gbar, A, B, amult, **layer.options()),)}
            found["backward"] = (ops.growing_backward(gbar, A, B, amult, delta, **layer.options()),)
            if ops.fused(BATCH, A, B, "growing_forward_jacobian"):
                found["jacobian"] = ops.growing_forward_jacobian(gbar, A, B, amult, **layer.options())
            blocks = [layer.cut(slice(first, first + ERROR_BLOCK)) for first in range(0, ERROR_ROWS, ERROR_BLOCK)]
            for op, parts in found.items():
                exact = [torch.zeros_like(part, dtype=torch.float64) for part in parts]
                for block in blocks:
                    for total, more in zip(exact, _exact(op, gbar.double(), delta.double(), block), strict=True):
                        total += more
                error = max(float((x - y).norm() / y.norm()) for x, y in zip(parts, exact, strict=True))
                results.append({"op": f"{name} {op}", "amult": amult_scale, "A": A_scale, "relative_error": error})
                print(f"error of {name} {op}, amult {amult_scale:g}, A {A_scale:g}: {error:.1e}", flush=True)
    return results


def _exact(op: str, gbar: Tensor, delta: Tensor, block: Layer) -> tuple[Tensor, ...]:
    block = Layer(*(part if part is None else part.double() for part in block))
    rows, options = block[:3], block.options()
    if op == "forward":
        return (reference.growing_forward(gbar, *rows, **options),)
    if op == "backward":
        return (reference.growing_backward(gbar, *rows, delta, **options),)
    return reference.growing_forward_jacobian(gbar, *rows, **options)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 4 GB."""
    source = torch.randn(1 << 30, device=CUDA)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (eager_milliseconds(lambda: target.copy_(source)) * 1e-3)


def measure(rows: list[int], dtype: torch.dtype) -> dict:
    """All numbers of the JSON file."""
    bandwidth = copy_bandwidth()
    layers = {name: random_layer(max(rows), columns, dtype) for name, columns in COLUMNS.items()}
    row_bytes = {name: layer.row_bytes for name, layer in layers.items()}
    results = []
    for M in rows:
        count = torch.tensor([M], device=CUDA)
        ops_of = {key: call for name, layer in layers.items() for key, call in calls(name, layer, BATCH, count).items()}
        del ops_of["hidden jacobian"]
        step = [ops_of[f"{name} {op}"] for name, op in STEP]
        few_shot = calls("hidden", layers["hidden"], FEW_SHOT_BATCH, count)
        result = {
            "rows": M,
            "limit_ms": 2 * M * sum(row_bytes.values()) / bandwidth * 1e3,
            "step_ms": milliseconds(*step),
            "ops_ms": {name: milliseconds(call) for name, call in ops_of.items()},
            "few_shot_hidden_ms": milliseconds(few_shot["hidden forward"], few_shot["hidden backward"]),
        }
        result["share_of_copy_bandwidth"] = {
            name: M * row_bytes[name.split()[0]] / (time * 1e-3) / bandwidth for name, time in result["ops_ms"].items()
        }
        results.append(result)
        print(f"M = {M:>9,}: step {result['step_ms']:.3f} ms, two-pass limit {result['limit_ms']:.3f} ms", flush=True)
        if M > PLAIN_ROWS:
            continue
        with ops.use("blocked"):
            sliced = {name: layer.cut(slice(M)) for name, layer in layers.items()}
            plain = {key: c for name, layer in sliced.items() for key, c in calls(name, layer, BATCH, None).items()}
            result["plain_torch_step_ms"] = eager_milliseconds(lambda p=plain: [p[f"{n} {op}"]() for n, op in STEP], 3)
            plain = calls("hidden", sliced["hidden"], FEW_SHOT_BATCH, None)
            result["plain_torch_few_shot_hidden_ms"] = eager_milliseconds(
                lambda p=plain: (p["hidden forward"](), p["hidden backward"]()), 3
            )
    return {
        "command": " ".join(["python", *sys.argv]),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rank": RANK,
        "batch": BATCH,
        "few_shot_batch": FEW_SHOT_BATCH,
        "columns": COLUMNS,
        "dtype": str(dtype).removeprefix("torch."),
        "copy_bandwidth_TB_s": bandwidth / 1e12,
        "bytes_per_row_and_pass": row_bytes,
        "results": results,
        "error_rows": ERROR_ROWS,
        "errors": errors(dtype),
    }


def draw(report: dict, path: Path) -> None:
    """Time per step against rows: measured, plain torch, and the memory limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = report["results"]
    rows = [result["rows"] for result in results]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), facecolor="white")
    plain = [(r["rows"], r["plain_torch_step_ms"]) for r in results if "plain_torch_step_ms" in r]
    axes.loglog(*zip(*plain, strict=True), "s-", color="tab:gray", label="plain torch, blocked")
    axes.loglog(rows, [r["step_ms"] for r in results], "o-", color="tab:blue", label="fused")
    axes.loglog(rows, [r["limit_ms"] for r in results], "--", color="black", label="memory limit of two passes")
    axes.set_xlabel("rows M")
    axes.set_ylabel("forward and backward of both growing layers [ms]")
    axes.set_title(
        f"{report['gpu']}, r = {RANK}, batch {BATCH}, {report['dtype']} ({report['copy_bandwidth_TB_s']:.2f} TB/s copy)"
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 50_000, 250_000, 1_000_000, 2_500_000])
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "int8"), default="float16")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device", file=sys.stderr)
        return 2
    report = measure(arguments.rows, getattr(torch, arguments.dtype))
    arguments.out.mkdir(parents=True, exist_ok=True)
    gpu, other = report["gpu"].removeprefix("NVIDIA ").lower().replace(" ", "_"), f"{arguments.dtype}_"
    stem = arguments.out / f"ops_{'' if arguments.dtype == 'float16' else other}{gpu}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, stem.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
