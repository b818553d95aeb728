"""Checkpoints on the Hugging Face Hub: how they are called, and how they come here.

huggingface_hub's own client does the work: its cache, its tokens, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` mean here what they
mean everywhere. What is added: all files are of one commit, and every file of weights is the one its checkpoint recorded.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pizoo import checkpoint, segments
from pizoo.config import CONFIG, NewerFormatError, read_config
from pizoo.files import CheckpointError, check_file, read_json

PREFIX = "hf-hub:"  # timm's word
NAMESPACE = "PIZOO_HUB"  # environment variable: whose repositories hold the zoo's entries
FULL = "full"  # in an entry's repository: the folder of the training that the shipped net is made of
ADDRESS = re.compile(r"(?P<repo_id>[^/@]+/[^/@]+)(?:/(?P<folder>[^@]+))?(?:@(?P<revision>.+))?")
OPTIONS = ("token", "cache_dir", "force_download", "local_files_only")  # of the client's hf_hub_download
WORDS = "OWNER/NAME, OWNER/NAME/FOLDER or OWNER/NAME@REVISION"


class HubError(CheckpointError):
    """What could not be fetched from the Hub or published there; the message says what to do about it."""


class MissingFileError(HubError):
    """A repository without a file that its checkpoint needs."""


class Address(NamedTuple):
    """Where on the Hub a checkpoint is.

    Attributes:
        repo_id: ``OWNER/NAME``.
        folder: in the repository; empty: its top.
        revision: branch, tag or commit; None: the client's default, ``main``.
    """

    repo_id: str
    folder: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, name: str, revision: str | None = None) -> Address:
        """The address in ``name``: ``hf-hub:OWNER/NAME``, with ``/FOLDER`` and ``@REVISION`` after it if need be.

        Raises:
            ValueError: another form, or two revisions.
        """
        found = ADDRESS.fullmatch(name.removeprefix(PREFIX))
        if found is None or not {"", ".", ".."}.isdisjoint((found["folder"] or "full").split("/")):
            raise ValueError(f"{name!r} does not name a repository of the Hub; it must be {WORDS}")
        if revision is not None and found["revision"] is not None:
            raise ValueError(f"revision is {revision!r}, and {name!r} has a revision already")
        return cls(found["repo_id"], found["folder"] or "", revision or found["revision"])

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return f"{PREFIX}{self.repo_id}{'/' if self.folder else ''}{self.folder}{at}"


def is_address(entry: str | os.PathLike) -> bool:
    """Whether a name says that it is of the Hub."""
    return isinstance(entry, str) and entry.startswith(PREFIX)


def default_address(entry: str) -> Address | None:
    """Where the Hub is to hold an entry of the zoo: ``$PIZOO_HUB/cifar10-infpi``; None where no namespace is set."""
    namespace = os.environ.get(NAMESPACE)
    if not namespace:
        return None
    name, _, folder = entry.partition("/")
    return Address(f"{namespace}/{name.replace('_', '-')}", folder)


def fetch(
    address: Address, weights: bool = True, epoch: int | None = None, records: bool = False, **options: Any
) -> Path:
    """Bring a checkpoint into the client's cache and check it; what is there already is not fetched again.

    Args:
        weights: False: its ``config.json`` alone.
        epoch: of a training; None: the one its training chose, else the last. Of an entry's repository that holds the
            training too (:data:`FULL`), an epoch of that.
        records: also what the checkpoint recorded about itself, as far as there is any: for :func:`pizoo.verify`.
        options: :data:`OPTIONS`, as ``huggingface_hub.hf_hub_download`` takes them.

    Returns:
        the checkpoint's folder in the cache, all of one commit.

    Raises:
        HubError: no such repository, revision or file, not allowed, not reachable and not in the cache, damaged on the way.
            A damaged file is taken out of the cache, so that another try fetches it again.
        NewerFormatError: a checkpoint that a later version of pizoo wrote; it stays in the cache.
        CheckpointError: no such epoch.
        TypeError: other options.
    """
    check_options(options)
    folder = _download(address, CONFIG, **options).parent
    # Whatever is pushed meanwhile, the files of one fetch are of one commit, and cached ones need no connection.
    pinned = address._replace(revision=_commit(folder, address))
    with _discarding(folder / CONFIG):
        files = read_config(folder)["pizoo"]["files"]
    if epoch is not None and checkpoint.MODEL in files and not address.folder:
        return fetch(pinned._replace(folder=FULL), weights, epoch, records, **options)
    if not weights:
        return folder
    if checkpoint.MODEL not in files:
        manifest = _download(pinned, segments.MANIFEST, **options)
        with _discarding(manifest):
            segments.read_manifest(folder)
        files = segments.epoch_files(folder, epoch)
    if records:
        files = files | _records(pinned, **options)
    for name, digest in files.items():
        path = _download(pinned, name, **options)
        with _discarding(path):
            check_file(path, digest)
    return folder


def check_options(options: Iterable[str]) -> None:
    """Raise TypeError if there are others than :data:`OPTIONS`."""
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise TypeError(
            f"{', '.join(unknown)}: no such option; what is fetched from the Hub takes {', '.join(OPTIONS)}"
        )


def _records(address: Address, **options: Any) -> dict[str, str]:
    """Fetch what a checkpoint recorded of itself, if it did; returns what belongs to it, with its SHA-256."""
    try:
        path = _download(address, checkpoint.RESULTS, **options)
    except MissingFileError:
        return {}
    with _discarding(path):
        digest = read_json(path).get("correct_sha256")
    return {checkpoint.CORRECT: digest} if digest else {}


def _download(address: Address, name: str, **options: Any) -> Path:
    with explained(f"{name} of {address}", address):
        path = hf_hub_download(
            address.repo_id,
            name,
            subfolder=address.folder or None,
            revision=address.revision,
            library_name="pizoo",
            **options,
        )
    return Path(path)


def _commit(folder: Path, address: Address) -> str:
    """The commit that a folder of the cache is of."""
    for _ in Path(address.folder).parts:
        folder = folder.parent
    return folder.name


@contextmanager
def _discarding(path: Path) -> Iterator[None]:
    """Take a file that turns out damaged out of the cache: it would be found there by every other try."""
    try:
        yield
    except NewerFormatError:  # not damaged
        raise
    except CheckpointError as error:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise HubError(
            f"{error} (taken out of the cache: another try fetches it again; if that ends the same, the Hub has it like this)"
        ) from None


# ---------------------------------------------------------------------------------------------------- errors


@contextmanager
def explained(what: str, address: Address) -> Iterator[None]:
    """Say in the user's words what the client reports.

    Raises:
        HubError: whatever went wrong.
    """
    try:
        yield
    except CheckpointError:
        raise
    # All of them: the client lets those of its HTTP library through, which is another one in each of its versions.
    except Exception as error:
        kind = MissingFileError if _is_missing(error) else HubError
        raise kind(f"{what}: {_reason(error, address)}") from error


def _is_missing(error: Exception) -> bool:
    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def _reason(error: BaseException, address: Address) -> str:
    """What went wrong, and what to do."""
    # The client puts what happened beneath what it was doing.
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and not isinstance(chain[-1], HfHubHTTPError):
        chain.append(cause)
    absent = "it is not in the cache, and " if isinstance(error, LocalEntryNotFoundError) else ""
    for found in chain:
        if known := _known(found, address):
            return absent + known
    if absent and len(chain) == 1:
        return f"{absent}nothing but the cache was to be used (local_files_only)"
    if absent or type(chain[0]).__name__ in ("ConnectError", "ConnectTimeout"):  # in httpx, and in httpx2
        return f"{absent}{constants.ENDPOINT} cannot be reached ({_line(chain[-1])})"
    return f"the transfer broke off ({_line(chain[-1])}); try again: files that have arrived are not sent again"


def _known(error: BaseException, address: Address) -> str | None:
    """In words, an error that says itself what went wrong."""
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{constants.ENDPOINT} shows no repository {address.repo_id} to this account: check the name; if it is private, "
            "log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{address.repo_id} has no revision {address.revision or constants.DEFAULT_REVISION!r}"
    if _is_missing(error):
        return (
            f"{address.repo_id} has no such file at that revision: it does not hold this checkpoint, or not all of it"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: the Hub is not asked"
    if isinstance(error, HfHubHTTPError):
        return _refused(error, address)
    if isinstance(error, HFValidationError):
        return _line(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return (
            f"the disk takes no more ({os.strerror(error.errno)}); what was there before still is: make room, try again"
        )
    return None


def _refused(error: HfHubHTTPError, address: Address) -> str:
    status = error.response.status_code
    if status == 401:
        return "nobody is logged in, or with a token that is not valid (HTTP 401): use `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"this account's token gives no right to do that to {address.repo_id} (HTTP 403)"
    if status == 429:
        return f"{constants.ENDPOINT} goes on asking to slow down (HTTP 429): try again later"
    if status >= 500:
        return f"{constants.ENDPOINT} fails (HTTP {status}): try again later"
    return f"{constants.ENDPOINT} refuses it (HTTP {status}: {_line(error)})"


def _line(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------------------------- cards

TAGS = ["pi-net", "infinite-width"]
CARD = """\
---
{{ card_data }}
---

# {{ name }}

{{ about }}, of the [pi-net](https://openreview.net/forum?id=tUMr0Iox8XW) kind. A checkpoint of the package pizoo:

```python
import pizoo

model = pizoo.load("{{ source }}")
```
"""


def plain_card(name: str, about: str, source: str) -> ModelCard:
    """The card of a checkpoint that has none of its own, as the zoo's entries have; ``source``: what to load it by."""
    data = ModelCardData(library_name="pizoo", tags=TAGS)
    return ModelCard.from_template(data, template_str=CARD, name=name, about=about, source=source)
