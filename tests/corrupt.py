"""Corrupted checkpoints: everything that happens to files, and what a careful enemy would do, from a seed.

A checkpoint is a dict of its files' bytes. A kind of corruption takes it and a random generator and gives another one, or None
where it does not apply. What is ``signed`` carries digests that fit: all that is left are the checks behind them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file

import pizoo
from pizoo import checkpoint, zoo
from pizoo.config import config_digest
from pizoo.evaluation.verify import PROBE_TOLERANCE, verify
from pizoo.files import CheckpointError, json_sha256, write_json, write_tensors
from pizoo.recipes import load_recipe
from pizoo.segments import read_manifest

Files = dict[str, bytes]
CARDS = ("digits_infpi", "digits_finpi", "digits_mu", "digits_nngp")
TINY = ("data.subset=40", "train.epochs=3", "train.batch_size=16", "train.lr=0.1", "model.r=8")
TRAININGS = {
    "growing": ("digits_infpi", (*TINY, "train.dtype=float32", "train.weight_decay=0.01")),
    "int8": ("digits_infpi", (*TINY, "train.dtype=int8")),
    "momentum": ("digits_infpi", (*TINY, "train.momentum=0.9", "train.dtype=float16")),
    "finite": ("digits_finpi", (*TINY, "model.width=16", "train.momentum=0.9")),
    "shares": ("digits_infpi", (*TINY, "train.dtype=float16", "train.weight_decay=0.01")),
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 12345\n" % (b"0" * 64)
CONFIG, MANIFEST, MODEL, PROBE_FILE = "config.json", "checkpoint.json", "model.safetensors", "probe.safetensors"
ODD = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    -(10**9),
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    [],
    [1],
    {},
    {"a": 1},
)


# ---------------------------------------------------------------------------------------------------- what is corrupted


class Subject(NamedTuple):
    """A checkpoint as it should be: its files, the net that loading them gives, and those of earlier epochs."""

    name: str
    files: Files
    model: torch.nn.Module
    epochs: list[torch.nn.Module]

    @property
    def shipped(self) -> bool:
        return MODEL in self.files


def subjects(folder: Path) -> list[Subject]:
    """The digits' cards, and small trainings made in ``folder``."""
    for entry in CARDS:
        shutil.copytree(zoo.card(entry), folder / entry, ignore=shutil.ignore_patterns("*.png", "tuned"))
    for name, (entry, overrides) in TRAININGS.items():
        pizoo.train(load_recipe(entry, overrides), folder / name, device="cpu")
    split(folder / "shares")
    made = []
    for path in (folder / name for name in (*CARDS, *TRAININGS)):
        files = {
            file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.suffix in (".json", ".safetensors")
        }
        earlier = [pizoo.load(path, epoch=int(name[6:11])) for name in files if name.startswith("state-")]
        made.append(Subject(path.name, files, pizoo.load(path), earlier))
    return made


def split(folder: Path, of: int = 2) -> None:
    """Make the checkpoint of a training what ``of`` processes would have written."""
    manifest, segments = read_manifest(folder), []
    for entry in manifest["segments"]:
        tensors = load_file(folder / entry["file"])
        (folder / entry["file"]).unlink()
        for k in range(of):
            first = {name: (k - start) % of for name, (start, _) in entry["rows"].items()}
            own = {key: part[first[key.rpartition(".")[0]] :: of] for key, part in tensors.items()}
            rows = {name: [start + first[name], stop, of] for name, (start, stop) in entry["rows"].items()}
            file = entry["file"].replace(".safetensors", f"-{k}of{of}.safetensors")
            segments.append({"file": file, "sha256": write_tensors(folder / file, own), "rows": rows})
    epochs = [{**record, "segments": of * record["segments"]} for record in manifest["epochs"]]
    manifest |= {"segments": segments, "epochs": epochs}
    write_json(folder / MANIFEST, {**manifest, "sha256": json_sha256(manifest)})


# ---------------------------------------------------------------------------------------------------- tools


def tensors_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    told = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(told)) + told + data


def sign(files: Files) -> Files:
    """Digests that fit what is there."""
    files = dict(files)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    config = json.loads(files[CONFIG])
    for name in config["pizoo"]["files"]:
        if name in digests:
            config["pizoo"]["files"][name] = digests[name]
    config["pizoo"]["sha256"] = config_digest(config)
    files[CONFIG] = json.dumps(config).encode()
    if MANIFEST in files:
        manifest = json.loads(files[MANIFEST])
        manifest.pop("sha256", None)
        manifest["config"] = config["pizoo"]["sha256"]
        for entry in (*manifest["segments"], *(record["state"] for record in manifest["epochs"] if record["state"])):
            if entry["file"] in digests:
                entry["sha256"] = digests[entry["file"]]
        files[MANIFEST] = json.dumps({**manifest, "sha256": json_sha256(manifest)}).encode()
    return files


def loaded_tensor_files(files: Files) -> list[str]:
    """The safetensors files that loading the net reads."""
    if MODEL in files:
        return [MODEL]
    states = sorted(name for name in files if name.startswith("state-"))
    return [*(name for name in files if name.startswith("rows-")), states[-1]]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def edited(value: Any, rng: random.Random, within: tuple[Any, ...] = ()) -> Any:
    """A JSON value with one random change under ``within``."""
    value, root = copy.deepcopy(value), None
    inner = value
    for key in within:
        inner = inner[key]
    path = (*within, *rng.choice(list(places(inner))[1:] or [()]))
    if not path:
        return rng.choice(ODD)
    root = value
    for key in path[:-1]:
        root = root[key]
    match rng.randrange(4):
        case 0:
            del root[path[-1]]
        case 1 if isinstance(root, list):
            rng.shuffle(root)
        case 1:
            root[f"{path[-1]}x"] = root.pop(path[-1])
        case _:
            root[path[-1]] = copy.deepcopy(rng.choice(ODD))
    return value


# ---------------------------------------------------------------------------------------------------- what happens to files


def some(files: Files, rng: random.Random) -> str:
    return rng.choice([name for name in files if name != "correct.safetensors"])


def flipped_bits(files: Files, rng: random.Random) -> Files:
    name = some(files, rng)
    content = bytearray(files[name])
    for _ in range(rng.choice((1, 1, 1, 2, 30))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return files | {name: bytes(content)}


def flipped_in_the_header(files: Files, rng: random.Random) -> Files:
    """Of a safetensors file, under a digest that fits: what the format itself notices."""
    name = rng.choice(loaded_tensor_files(files))
    content = bytearray(files[name])
    (length,) = struct.unpack("<Q", content[:8])
    content[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
    return sign(files | {name: bytes(content)})


def truncated(files: Files, rng: random.Random) -> Files:
    name = some(files, rng)
    length = rng.choice((0, 1, 8, rng.randrange(len(files[name])), len(files[name]) - 1))
    return files | {name: files[name][:length]}


def truncated_and_signed(files: Files, rng: random.Random) -> Files:
    name = rng.choice(loaded_tensor_files(files))
    return sign(files | {name: files[name][: rng.randrange(len(files[name]))]})


def lengthened(files: Files, rng: random.Random) -> Files:
    name = some(files, rng)
    return files | {name: files[name] + rng.randbytes(rng.choice((1, 100)))}


def overwritten(files: Files, rng: random.Random) -> Files:
    name = some(files, rng)
    at, length = rng.randrange(len(files[name])), rng.choice((16, 512, 4096))
    span = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return files | {name: (files[name][:at] + span)[: len(files[name])] + files[name][at + length :]}


def missing(files: Files, rng: random.Random) -> Files:
    name = some(files, rng)
    return {key: content for key, content in files.items() if key != name}


def pointers(files: Files, rng: random.Random) -> Files:
    return files | {some(files, rng): POINTER}


def swapped_files(files: Files, rng: random.Random) -> Files | None:
    names = [name for name in files if name.endswith(".safetensors")]
    if len(names) < 2:
        return None
    one, other = rng.sample(names, 2)
    return files | {one: files[other], other: files[one]}


def of_another_training(files: Files, rng: random.Random, others: list[Subject]) -> Files | None:
    found = [
        other.files for other in others if other.files is not files and other.files.keys() & files.keys() - {CONFIG}
    ]
    other = rng.choice(found)
    name = rng.choice(sorted(files.keys() & other.keys()))
    return files | {name: other[name]} if other[name] != files[name] else None


# ---------------------------------------------------------------------------------------------------- edited JSON


def edited_json(files: Files, rng: random.Random) -> Files:
    name = rng.choice([name for name in files if name.endswith(".json") and name != "results.json"])
    return files | {name: json.dumps(edited(json.loads(files[name]), rng)).encode()}


def edited_results(files: Files, rng: random.Random) -> Files | None:
    if "results.json" not in files or MODEL not in files:
        return None
    return files | {"results.json": json.dumps(edited(json.loads(files["results.json"]), rng)).encode()}


def reshaped_json(files: Files, rng: random.Random) -> Files:
    """The same values in other spaces and another order: nothing is lost."""
    name = rng.choice([name for name in files if name.endswith(".json")])
    value = json.loads(files[name])
    return files | {name: json.dumps(value, indent=rng.choice((None, 4)), sort_keys=True).encode() + b"\n\n"}


def monstrous_json(files: Files, rng: random.Random) -> Files:
    name = rng.choice([name for name in (CONFIG, MANIFEST) if name in files])
    content = files[name].rstrip()
    monster = rng.choice(
        (
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"9" * 100_000,
            b"\xff\xfe" + content,
            content[:-1] + b', "x": ' + b"9" * 10_000 + b"}",
            content[:-1] + b', "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
            content + content,
            content.decode().encode("utf-16"),
            b"NaN",
            b"null",
            b"",
        )
    )
    return files | {name: monster}


def signed_config(files: Files, rng: random.Random) -> Files | None:
    """What builds the net, changed under a digest that fits. The probe of a shipped net is what is left to tell."""
    config = json.loads(files[CONFIG])
    changed = edited(config, rng, ("pizoo", rng.choice(("hparams", "hparams", "hparams", "files"))))
    if rng.random() < 0.3:
        changed["pizoo"][rng.choice(("class", "rows_dtype", "hparams", "files"))] = copy.deepcopy(rng.choice(ODD))
    try:
        changed["pizoo"]["sha256"] = config_digest(changed)
    except (TypeError, ValueError):
        return None
    return files | {CONFIG: json.dumps(changed).encode()}


def signed_alphas(files: Files, rng: random.Random) -> Files | None:
    config = json.loads(files[CONFIG])
    hparams = config["pizoo"]["hparams"]
    name = rng.choice([name for name in hparams if name.endswith(("alpha", "var_w", "var_b"))])
    hparams[name] = (hparams[name] or 0.3) * rng.choice((0.5, 0.9, 1.1, 2.0)) + rng.choice((0.0, 0.1))
    return sign(files | {CONFIG: json.dumps(config).encode()})


def huge_shapes(files: Files, rng: random.Random) -> Files:
    """Sizes that no machine holds, or less than none, in what builds the net."""
    config = json.loads(files[CONFIG])
    sizes = [
        name for name in config["pizoo"]["hparams"] if name in ("d_in", "d_out", "r", "width", "hidden_layers", "depth")
    ]
    for name in rng.sample(sizes, rng.randint(1, len(sizes))):
        config["pizoo"]["hparams"][name] = rng.choice((-1, 0, 10**5, 10**6, 10**9, 10**12, 2**40, 10**30, 1e9, True))
    return sign(files | {CONFIG: json.dumps(config).encode()})


def signed_manifest(files: Files, rng: random.Random) -> Files | None:
    if MANIFEST not in files:
        return None
    manifest = json.loads(files[MANIFEST])
    manifest.pop("sha256")
    manifest["epochs"] = [{k: v for k, v in record.items() if k != "metrics"} for record in manifest["epochs"]]
    changed = edited(manifest, rng)
    if not isinstance(changed, dict):
        return None
    return files | {MANIFEST: json.dumps({**changed, "sha256": json_sha256(changed)}).encode()}


def swapped_segments(files: Files, rng: random.Random) -> Files | None:
    """Listed in another order, under a digest that fits: rows would go with the multipliers of others."""
    if MANIFEST not in files or len(segments := json.loads(files[MANIFEST])["segments"]) < 2:
        return None
    manifest = json.loads(files[MANIFEST])
    i, j = rng.sample(range(len(segments)), 2)
    manifest["segments"][i], manifest["segments"][j] = segments[j], segments[i]
    return sign(files | {MANIFEST: json.dumps(manifest).encode()})


# ---------------------------------------------------------------------------------------------------- tensors


def retensored(change: Callable[[dict[str, Any], str, random.Random], Any]) -> Callable[[Files, random.Random], Files]:
    """A kind that changes the header of a safetensors file that is loaded, and signs it."""

    def corrupt(files: Files, rng: random.Random) -> Files | None:
        name = rng.choice(loaded_tensor_files(files))
        header, data = tensors_of(files[name])
        names = [key for key in header if key != "__metadata__" and not key.startswith("optimizer/")]
        changed = change(header, rng.choice(names), rng)
        return None if changed is None else sign(files | {name: with_header(changed, data)})

    corrupt.__name__ = change.__name__
    return corrupt


@retensored
def swapped_tensors(header: dict[str, Any], name: str, rng: random.Random) -> Any:
    other = rng.choice([key for key in header if key not in ("__metadata__", name)] or [name])
    header[name], header[other] = header[other], header[name]
    return header if other != name else None


@retensored
def renamed_tensors(header: dict[str, Any], name: str, rng: random.Random) -> Any:
    header[rng.choice((f"{name}x", "x", "", "/", "amult/", "decay/x", "model/x", "../x", "output.A.B"))] = header.pop(
        name
    )
    return header


@retensored
def wrong_dtypes(header: dict[str, Any], name: str, rng: random.Random) -> Any:
    """Of the same size, so that the file as such is in order."""
    same_size = {
        "F64": ("I64", "U64", "C64"),
        "F32": ("I32", "U32"),
        "F16": ("I16", "U16", "BF16"),
        "I8": ("U8", "F8_E5M2", "F8_E4M3", "BOOL"),
    }
    told = header[name]["dtype"]
    if told not in same_size:
        return None
    header[name]["dtype"] = rng.choice((*same_size[told], "X9", "f32", None, 5))
    return header


@retensored
def wrong_shapes(header: dict[str, Any], name: str, rng: random.Random) -> Any:
    shape = header[name]["shape"]
    odd = [[-1], [-2, -3], [2**62, 2**62], [10**30], [0], ["a"], None, 5, [*shape, 1], [1, *shape], shape[::-1], [1.5]]
    header[name]["shape"] = rng.choice(odd)
    return header


@retensored
def wrong_offsets(header: dict[str, Any], name: str, rng: random.Random) -> Any:
    begin, end = header[name]["data_offsets"]
    odd = [
        [end, begin],
        [begin - 1, end],
        [begin, end + 1],
        [-1, end],
        [0, 2**63],
        [begin],
        None,
        [0, 10**30],
        [begin, begin],
    ]
    header[name]["data_offsets"] = rng.choice(odd)
    return header


@retensored
def monstrous_headers(header: dict[str, Any], name: str, rng: random.Random) -> Any:
    told = json.dumps(header).encode()
    return rng.choice(
        (b"[" * 100_000, b'{"a":' * 100_000, b"", b"{}", told[:-1], told * 2, b"\xff" * 100, b"null", told + b"}")
    )


def huge_header(files: Files, rng: random.Random) -> Files:
    name = rng.choice(loaded_tensor_files(files))
    length = rng.choice((2**64 - 1, 2**63, 2**40, 10**8, 0, 1))
    return sign(files | {name: struct.pack("<Q", length) + files[name][8:]})


KINDS: dict[str, Callable[..., Files | None]] = {
    kind.__name__.replace("_", " "): kind
    for kind in (
        flipped_bits,
        flipped_in_the_header,
        truncated,
        truncated_and_signed,
        lengthened,
        overwritten,
        missing,
        pointers,
        swapped_files,
        of_another_training,
        edited_json,
        edited_results,
        reshaped_json,
        monstrous_json,
        signed_config,
        signed_alphas,
        huge_shapes,
        signed_manifest,
        swapped_segments,
        swapped_tensors,
        renamed_tensors,
        wrong_dtypes,
        wrong_shapes,
        wrong_offsets,
        monstrous_headers,
        huge_header,
    )
}
# Whoever can sign can write any net: of these kinds only the probe of a shipped net can tell that it is another one.
ANOTHER_NET = ("signed config", "signed alphas", "swapped tensors", "wrong dtypes", "flipped in the header")


# ---------------------------------------------------------------------------------------------------- what comes of it

REFUSED, SAME = "refused with a message", "loaded, the same to the bit"
RECORDS = "loaded, the same to the bit; the quick check says that what is recorded beside it is damaged"
PROBE = "another net under digests that fit: the quick check says so"
CLOSE = "another net under digests that fit, its logits within the quick check's tolerance"
EARLIER = "digests that fit name an earlier epoch, and that is loaded, the same to the bit"
GOOD = (REFUSED, SAME, RECORDS, PROBE, CLOSE, EARLIER)


def cases(count: int, made: list[Subject], seed: int = 0) -> Iterator[tuple[str, Subject, Files]]:
    """``count`` corruptions, every kind as often as any other: kind, subject, files."""
    rng, kinds = random.Random(seed), list(KINDS)
    for i in range(count):
        kind = kinds[i % len(kinds)]
        able = [subject for subject in made if subject.shipped or kind not in ANOTHER_NET]
        while True:
            subject = rng.choice(able)
            files = KINDS[kind](subject.files, rng, *((made,) if kind == "of another training" else ()))
            if files is not None and files != subject.files:
                break
        yield kind, subject, files


def same(model: torch.nn.Module, config: dict[str, Any], wanted: torch.nn.Module) -> bool:
    """Whether a net, and what its inputs and outputs mean, is to the bit what it was."""
    if type(model) is not type(wanted) or model.hparams != wanted.hparams:
        return False
    found, kept = model.state_dict(), wanted.state_dict()
    equal = found.keys() == kept.keys() and all(
        found[name].dtype == kept[name].dtype and torch.equal(found[name], kept[name]) for name in kept
    )
    data = [{k: v for k, v in one["recipe"]["data"].items() if k != "path"} for one in (config, wanted.config)]
    return equal and data[0] == data[1]


def outcome(folder: Path, kind: str, subject: Subject) -> str:
    """What loading a corrupted checkpoint, and for a shipped one the quick check of it, comes to."""
    try:
        model = pizoo.load(folder)
    except CheckpointError as error:
        text = str(error)
        return REFUSED if "\n" not in text and 20 < len(text) < 3000 else f"told badly: {text[:200]}"
    except BaseException as error:
        return f"crashed: {type(error).__name__}: {str(error)[:200]}"
    if not subject.shipped:
        if same(model, model.config, subject.model):
            return SAME
        earlier = any(same(model, model.config, epoch) for epoch in subject.epochs)
        return EARLIER if kind == "signed manifest" and earlier else "CHANGED"
    try:
        report = verify(str(folder), device="cpu", quick=True)
    except BaseException as error:
        return f"crashed in verify: {type(error).__name__}: {str(error)[:200]}"
    if same(model, model.config, subject.model):
        return SAME if report.status == "verified" else RECORDS
    if kind not in ANOTHER_NET:
        return "CHANGED"
    if report.status == "mismatch":
        return PROBE
    return CLOSE if distance(model, subject) <= PROBE_TOLERANCE else "CHANGED"


@torch.no_grad()
def distance(model: torch.nn.Module, subject: Subject) -> float:
    """Relative difference of the logits of a shipped net's probe from those recorded."""
    probe = load_tensors(subject.files[PROBE_FILE])
    logits = checkpoint.probe_logits(model, probe["x"], probe.get("train_x")).double()
    return ((logits - probe["logits"].double()).norm() / probe["logits"].double().norm()).item()


def write(folder: Path, files: Files) -> None:
    """Make a folder hold these files and no others; those it has already are left as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    for name, content in files.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != len(content) or path.read_bytes() != content:
            path.write_bytes(content)


def fuzz(count: int, made: list[Subject], folder: Path, seed: int = 0) -> Iterator[tuple[str, Subject, str]]:
    """Corrupt ``count`` times; kind, subject and outcome of each. Works in ``folder``."""
    for kind, subject, files in cases(count, made, seed):
        write(folder / subject.name, files)
        yield kind, subject, outcome(folder / subject.name, kind, subject)
