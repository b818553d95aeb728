"""Publishing checkpoints on the Hugging Face Hub: whole, or not at all.

Everything is checked on this machine first. Large files are sent one by one, and what the Hub has already is not sent; then one
commit makes all of them visible together, or, if anything fails before it, none.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.sha import git_hash

from pizoo import __version__, hub, segments, zoo
from pizoo.checkpoint import CORRECT, MODEL, RESULTS
from pizoo.config import CONFIG, read_config
from pizoo.files import CheckpointError, check_file, read_json, sha256, sha256_of
from pizoo.hub import FULL, Address, HubError, explained
from pizoo.plots import CURVES, SIZES
from pizoo.segments import MANIFEST
from pizoo.zoo import TUNED

log = logging.getLogger("pizoo")

CARD = "README.md"
SHOWN = (CARD, RESULTS, CORRECT, CURVES, SIZES)  # beside the files that a checkpoint names itself, if they are there
MAIN = "main"


@dataclass(frozen=True)
class Upload:
    """A file to publish.

    Attributes:
        path: in the repository.
        source: where it is here, or what is in it.
        size: bytes.
        sha256: of its content.
        present: the repository has it already, the same: it is not sent.
    """

    path: str
    source: Path | bytes
    size: int
    sha256: str
    present: bool = False


@dataclass(frozen=True)
class Publication:
    """What :func:`publish` did, or would do.

    Attributes:
        address: where on the Hub.
        uploads: every file of it.
        commit: the commit's id; None after a dry run.
    """

    address: Address
    uploads: tuple[Upload, ...]
    commit: str | None

    @property
    def bytes_to_send(self) -> int:
        return sum(upload.size for upload in self.uploads if not upload.present)


def publish(
    entry: str | os.PathLike,
    repo_id: str | None = None,
    *,
    full: str | os.PathLike | None = None,
    dry_run: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Publication:
    """Put an entry, or any checkpoint, on the Hugging Face Hub in one commit.

    Args:
        entry: a name of the zoo, with its card; or the folder of a checkpoint, finished or in training (with every epoch).
        repo_id: ``OWNER/NAME``; None: the entry's own in the namespace ``$PIZOO_HUB``.
        full: folder of a training: published too, in the repository's folder ``full``, with every epoch it keeps.
        dry_run: only find out what would be sent; where the Hub cannot be asked, all of it, with a warning.
        private: of a repository that is made now; None: as the account has it.
        revision: branch to publish to, made if it is not there; None: ``main``.
        token: None: the one that is set, or logged in with.

    Returns:
        the files with their sizes, which of them the repository had already, and the commit. An interrupted publication is
        taken up by another call: it sends what has not arrived.

    Raises:
        UnknownEntryError: neither an entry nor a folder.
        CheckpointError: something to publish is missing or damaged; nothing was sent.
        HubError: the Hub did not take it; nothing of it is visible there.
        ValueError: a ``repo_id`` of another form, or none given and none set.
    """
    folder = zoo.folder_of(entry)
    address = _destination(folder, repo_id, revision)
    uploads = _contents(folder, address, full)
    api = HfApi(token=token, library_name="pizoo", library_version=__version__)
    try:
        exists, uploads = _compared(api, address, uploads)
    except HubError as error:
        if not dry_run:
            raise
        warnings.warn(f"what is there already is not known: {error}", RuntimeWarning, stacklevel=2)
    if dry_run:
        return Publication(address, uploads, None)
    with explained(f"publishing {folder} as {address}", address):
        if not exists:
            api.create_repo(address.repo_id, private=private, exist_ok=True)
        if address.revision not in (None, MAIN):
            api.create_branch(address.repo_id, branch=address.revision, exist_ok=True)
    return Publication(address, uploads, _send(api, address, uploads, folder))


def _destination(folder: Path, repo_id: str | None, revision: str | None) -> Address:
    if repo_id is None:
        address = hub.default_address(folder.name)
        if address is None:
            raise ValueError(f"no repo_id is given for {folder}, and {hub.NAMESPACE} is not set: give OWNER/NAME")
    else:
        address = Address.parse(repo_id)
    if address.folder or address.revision:
        raise ValueError(f"repo_id is {repo_id!r}; it must be OWNER/NAME (a branch goes into revision)")
    return address._replace(revision=revision)


# ---------------------------------------------------------------------------------------------------- what


def _contents(folder: Path, address: Address, full: str | os.PathLike | None) -> tuple[Upload, ...]:
    """Every file to publish, checked."""
    uploads = _files(folder, "")
    if (folder / TUNED / CONFIG).exists():
        uploads += _files(folder / TUNED, f"{TUNED}/")
    if full is not None:
        if _kind(folder) != _kind(Path(full)):
            raise CheckpointError(f"full is {full}, a training of another net or on other data than {folder} is of")
        uploads += _files(Path(full), f"{FULL}/")
    if all(upload.path != CARD for upload in uploads):
        uploads.append(_upload(CARD, _card(folder, address)))
    return tuple(uploads)


def _kind(folder: Path) -> tuple[str, str | None]:
    """Class of a checkpoint's net, and the data it is of."""
    config = read_config(folder)
    return config["pizoo"]["class"], config.get("recipe", {}).get("data", {}).get("name")


def _files(folder: Path, prefix: str) -> list[Upload]:
    """A checkpoint's files: those it names, which must be what it recorded, and what stands beside them to be read."""
    named = dict(read_config(folder)["pizoo"]["files"])
    training = segments.training_files(folder) if (folder / MANIFEST).exists() else {}
    if MODEL not in named and not training:
        raise CheckpointError(
            f"{folder} has no weights to publish: neither {MODEL} nor {MANIFEST}; train it, and publish the training's folder"
        )
    named |= training
    if (folder / RESULTS).exists() and (folder / CORRECT).exists():
        named[CORRECT] = read_json(folder / RESULTS).get("correct_sha256")
    for name, digest in named.items():
        check_file(folder / name, digest)
    beside = [name for name in (CONFIG, *([MANIFEST] if training else []), *SHOWN) if (folder / name).is_file()]
    return [
        _upload(f"{prefix}{name}", check_file(folder / name), named.get(name))
        for name in dict.fromkeys((*beside, *named))
    ]


def _upload(path: str, source: Path | bytes, digest: str | None = None) -> Upload:
    if isinstance(source, bytes):
        return Upload(path, source, len(source), sha256_of(source))
    return Upload(path, source, source.stat().st_size, digest or sha256(source))


def _card(folder: Path, address: Address) -> bytes:
    """A card for a checkpoint that has none."""
    found = read_config(folder)
    about = found.get("recipe", {}).get("description") or f"A `{found['pizoo']['class']}`"
    name = address.repo_id.partition("/")[2]
    return str(hub.plain_card(name, about, f"{hub.PREFIX}{address.repo_id}")).encode()


# ---------------------------------------------------------------------------------------------------- there


def _compared(api: HfApi, address: Address, uploads: tuple[Upload, ...]) -> tuple[bool, tuple[Upload, ...]]:
    """Whether the repository exists, and the uploads marked that it has already."""
    paths = [upload.path for upload in uploads]
    with explained(f"looking for what {address} has", address):
        try:
            there = {
                found.path: found for found in api.get_paths_info(address.repo_id, paths, revision=address.revision)
            }
        except RevisionNotFoundError:
            return True, uploads
        except RepositoryNotFoundError:
            return False, uploads
    marked = [
        Upload(one.path, one.source, one.size, one.sha256, one.path in there and _same(one, there[one.path]))
        for one in uploads
    ]
    return True, tuple(marked)


def _same(upload: Upload, found) -> bool:
    """Whether a file of a repository is the one to upload: large ones go by their SHA-256, others by git's hash."""
    if found.lfs is not None:
        return found.lfs.sha256 == upload.sha256
    if found.size != upload.size:
        return False
    content = upload.source if isinstance(upload.source, bytes) else upload.source.read_bytes()
    return found.blob_id == git_hash(content)


def _send(api: HfApi, address: Address, uploads: tuple[Upload, ...], folder: Path) -> str:
    """Send what is not there, file by file, and commit all of it at once; returns the commit's id."""
    wanted = [upload for upload in uploads if not upload.present]
    additions = [
        CommitOperationAdd(upload.path, upload.source if isinstance(upload.source, bytes) else str(upload.source))
        for upload in wanted
    ]
    for upload, addition in zip(wanted, additions, strict=True):
        with explained(f"sending {upload.path} to {address}", address):
            api.preupload_lfs_files(address.repo_id, [addition], revision=address.revision, num_threads=1)
        log.info("%s: %s sent (%d bytes)", address, upload.path, upload.size)
        if addition.upload_info.sha256.hex() != upload.sha256:
            raise HubError(f"{upload.source} has changed while it was sent; nothing was published: try again")
    with explained(f"committing {folder} to {address}", address):
        if not wanted:
            return api.model_info(address.repo_id, revision=address.revision).sha
        message = f"{folder.name}, with pizoo {__version__}"
        return api.create_commit(address.repo_id, additions, commit_message=message, revision=address.revision).oid
