"""The Hub: published and loaded by everybody's names; what goes wrong is said, loses nothing and can be tried again."""

from __future__ import annotations

import logging
import re
import shutil

import huggingface_hub
import pytest
import timm
import torch
from hub_faults import ADDRESS, ENTRY, EPOCHS, FAULTS, REPO, make_training, undergo
from loopback_hub import TOKEN

import pizoo
from pizoo import checkpoint, hub, segments, zoo
from pizoo.config import CONFIG, NewerFormatError
from pizoo.files import CheckpointError, read_json
from pizoo.hub import Address, HubError
from pizoo.models import FinPiMLP, InfPiMLP, MuMLP

SHIPPED = [entry for entry in zoo.list_entries() if zoo.has_weights(entry)]
OLD_CLIENT = int(huggingface_hub.__version__.partition(".")[0]) < 2
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture
def x():
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, x):
    return model(x)


# Faults


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_told_and_loses_nothing_and_the_next_try_succeeds(fault, scene):
    outcome = undergo(fault, scene)
    assert outcome.lost == []
    if fault.says is None:
        # The first clients of 1.x ask again less often; their users are told to.
        assert outcome.said is None or (OLD_CLIENT and "try again" in outcome.said)
    else:
        assert outcome.said and re.search(fault.says, outcome.said), outcome.said
        assert len(outcome.said.splitlines()) == 1


# Publishing


@pytest.mark.parametrize("entry", SHIPPED)
def test_every_shipped_entry_comes_back_from_the_hub_to_the_bit(entry, scene):
    name = entry.replace("_", "-")
    publication = pizoo.publish(entry, f"me/{name}")
    assert list(scene.hub.repositories[f"me/{name}"].commits)[1:] == [publication.commit]
    loaded, wanted = pizoo.load(f"hf-hub:me/{name}").state_dict(), pizoo.load(entry).state_dict()
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[key], wanted[key]) for key in wanted)
    assert pizoo.verify(f"hf-hub:me/{name}", device="cpu", quick=True).status == "verified"
    card = zoo.card(entry)
    for path, (sha256, _) in scene.hub.files(f"me/{name}").items():
        assert scene.hub.content(sha256).read_bytes() == (card / path).read_bytes()


def test_the_hub_shows_the_cards_evaluation_results(scene):
    pizoo.publish(ENTRY, REPO)
    card = huggingface_hub.ModelCard.load(REPO)
    recorded = read_json(zoo.card(ENTRY) / checkpoint.RESULTS)["accuracy"]
    assert card.data.eval_results[0].metric_value == pytest.approx(recorded, abs=1e-4)


def test_what_is_there_already_is_not_sent_and_makes_no_commit(scene):
    first = pizoo.publish(ENTRY, REPO)
    assert first.bytes_to_send == sum((zoo.card(ENTRY) / upload.path).stat().st_size for upload in first.uploads)
    again = pizoo.publish(ENTRY, REPO)
    assert (again.commit, again.bytes_to_send) == (first.commit, 0)
    card = scene.copy()
    (card / "README.md").write_text((card / "README.md").read_text() + "\nA word more.\n")
    assert [upload.path for upload in pizoo.publish(card, REPO).uploads if not upload.present] == ["README.md"]


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(scene):
    planned = pizoo.publish(ENTRY, REPO, dry_run=True)
    assert planned.commit is None and not scene.hub.repositories
    assert not [request for request in scene.hub.requests if not request.endswith("/paths-info/main")]
    with scene.offline(), pytest.warns(RuntimeWarning, match="not known: .*HF_HUB_OFFLINE is set"):
        assert pizoo.publish(ENTRY, REPO, dry_run=True) == planned
    assert planned.uploads == pizoo.publish(ENTRY, REPO).uploads
    assert pizoo.publish(ENTRY, REPO, dry_run=True).bytes_to_send == 0


def test_large_files_go_in_parts_where_the_hub_asks_for_it(scene, x, monkeypatch):
    monkeypatch.setattr(scene.hub, "part_bytes", 1 << 20)
    pizoo.publish(ENTRY, REPO)
    assert sum(request.startswith("PUT") and request.endswith("/5") for request in scene.hub.requests) == 1
    assert torch.equal(logits(pizoo.load(ADDRESS), x), logits(pizoo.load(ENTRY), x))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda card: (card / "model.safetensors").write_bytes(b"?" * 100), r"model\.safetensors has SHA-256"),
        (lambda card: (card / "model.safetensors").write_text(POINTER), r"model\.safetensors is a Git LFS pointer"),
        (lambda card: (card / "README.md").write_text(POINTER), r"README\.md is a Git LFS pointer"),
        (lambda card: (card / "config.json").write_text(POINTER), r"config\.json is a Git LFS pointer"),
        (lambda card: (card / "probe.safetensors").unlink(), r"probe\.safetensors is missing"),
        (lambda card: (card / "correct.safetensors").write_bytes(b""), r"correct\.safetensors has SHA-256"),
    ],
)
def test_a_damaged_card_is_refused_before_anything_is_sent(damage, says, scene):
    card = scene.copy()
    damage(card)
    with pytest.raises(CheckpointError, match=says):
        pizoo.publish(card, REPO)
    assert scene.hub.requests == []


def test_what_has_no_weights_or_no_name_is_refused(scene):
    without = next(entry for entry in zoo.list_entries() if not zoo.has_weights(entry))
    with pytest.raises(CheckpointError, match="has no weights to publish"):
        pizoo.publish(without, REPO)
    with pytest.raises(ValueError, match=r"no repo_id is given .*PIZOO_HUB is not set"):
        pizoo.publish(ENTRY)
    for name in ("digits", "me/digits/full", "me/digits@main", "a/b/c@d"):
        with pytest.raises(ValueError, match="must be OWNER/NAME"):
            pizoo.publish(ENTRY, name)
    assert scene.hub.requests == []


def test_a_new_repository_is_private_when_asked_to_be(scene):
    pizoo.publish(ENTRY, REPO, private=True)
    assert scene.hub.repositories[REPO].private
    with scene.stranger(), pytest.raises(HubError, match="if it is private, log in"):
        pizoo.load(ADDRESS)
    with scene.stranger():
        pizoo.load(ADDRESS, token=TOKEN)
    assert scene.hub.authorized == []  # the token stays with the Hub


# Growing checkpoints


def test_a_training_is_published_segment_by_segment_and_any_epoch_loads_with_what_it_needs_alone(scene, x):
    training = scene.training()
    publication = pizoo.publish(training, REPO)
    segments = {upload.path for upload in publication.uploads if upload.path.startswith("rows-")}
    assert len(segments) == EPOCHS + 1
    assert "pizoo.load" in scene.hub.content(scene.hub.files(REPO)["README.md"][0]).read_text()
    for epoch in range(1, EPOCHS + 1):
        loaded = pizoo.load(ADDRESS, epoch=epoch)
        assert torch.equal(logits(loaded, x), logits(pizoo.load(training, epoch=epoch), x))
        held = {path.name for path in scene.cache.rglob("snapshots/*/rows-*")}
        assert len(held) == epoch + 1
    with pytest.raises(CheckpointError, match=rf"holds epochs 1 to {EPOCHS}; epoch=9 is not there"):
        pizoo.load(ADDRESS, epoch=9)


def test_an_interrupted_publication_of_a_training_goes_on_with_the_next_segment(scene, x):
    training = scene.training()
    digests = segments.training_files(training)
    with (
        scene.hub.failing(f"PUT /upload/{digests['rows-00002.safetensors']}", 503),
        pytest.raises(HubError, match=r"sending rows-00002\.safetensors"),
    ):
        pizoo.publish(training, REPO)
    assert scene.hub.files(REPO) == {} and digests["rows-00001.safetensors"] in scene.hub.sent
    pizoo.publish(training, REPO)
    assert all(scene.hub.sent[digest] == 1 for digest in digests.values())
    assert torch.equal(logits(pizoo.load(ADDRESS), x), logits(pizoo.load(training), x))


def test_a_training_that_has_grown_sends_its_new_segments_alone(scene, tmp_path):
    make_training(tmp_path / "short", 2, rows=20, r=8)
    make_training(tmp_path / "long", 3, rows=20, r=8)  # the same net, an epoch later
    pizoo.publish(tmp_path / "short", REPO)
    grown = pizoo.publish(tmp_path / "long", REPO)
    sent = {upload.path for upload in grown.uploads if not upload.present}
    assert sent == {"checkpoint.json", "rows-00003.safetensors", "state-00003.safetensors"}


def test_an_entry_and_its_full_training_share_a_repository(scene, tmp_path, x):
    overrides = ("model.r=8", "data.subset=40", "train.epochs=2")
    pizoo.train(ENTRY, tmp_path / "run", overrides=overrides, device="cpu")
    pizoo.publish(ENTRY, REPO, full=tmp_path / "run")
    assert torch.equal(logits(pizoo.load(ADDRESS), x), logits(pizoo.load(ENTRY), x))
    for name in (ADDRESS, f"{ADDRESS}/full"):
        assert torch.equal(logits(pizoo.load(name, epoch=1), x), logits(pizoo.load(tmp_path / "run", epoch=1), x))
    assert torch.equal(logits(pizoo.load(f"{ADDRESS}/full@main"), x), logits(pizoo.load(tmp_path / "run"), x))
    with pytest.raises(CheckpointError, match="a training of another net or on other data"):
        pizoo.publish("digits_mu", "me/digits-mu", full=tmp_path / "run")


def test_a_config_that_names_files_elsewhere_is_refused(scene):
    pizoo.publish(ENTRY, REPO)
    files = scene.hub.files(REPO)
    content = scene.hub.content(files["config.json"][0]).read_bytes()
    astray = scene.hub.put(content.replace(b'"model.safetensors"', b'"../model.safetensors"'))
    scene.hub.commit(REPO, "main", files | {"config.json": (astray, False)})
    with pytest.raises(HubError, match=r"names '\.\./model\.safetensors', which is no file beside it"):
        pizoo.load(ADDRESS)


def with_format(content: bytes) -> bytes:
    assert content.count(b'"format": 1') == 1
    return content.replace(b'"format": 1', b'"format": 99')


@pytest.mark.parametrize("name", [CONFIG, segments.MANIFEST])
def test_a_checkpoint_of_a_newer_format_is_refused_and_stays_in_the_cache(scene, name):
    source = ENTRY if name == CONFIG else scene.training()
    pizoo.publish(source, REPO)
    files = scene.hub.files(REPO)
    newer = scene.hub.put(with_format(scene.hub.content(files[name][0]).read_bytes()))
    scene.hub.commit(REPO, "main", files | {name: (newer, False)})
    with pytest.raises(NewerFormatError, match=r"has format 99; .* a later one wrote it"):
        pizoo.load(ADDRESS)
    (kept,) = scene.cache.glob(f"models--*/snapshots/*/{name}")
    assert b'"format": 99' in kept.read_bytes()


def test_a_manifest_that_names_files_elsewhere_is_refused(scene):
    training = scene.training()
    manifest = segments.read_manifest(training)
    manifest["segments"][0]["file"] = "../../secret.safetensors"
    segments._write_manifest(training, manifest)
    with pytest.raises(CheckpointError, match=r"names '../../secret\.safetensors', which is no file beside it"):
        pizoo.publish(training, REPO)


# Loading


def test_a_revision_is_a_branch_or_a_commit_and_stays_what_it_was(scene, x):
    first = pizoo.publish(ENTRY, REPO)
    pizoo.publish("digits_mu", REPO, revision="other")
    assert isinstance(pizoo.load(ADDRESS), InfPiMLP)
    assert isinstance(pizoo.load(ADDRESS, revision="other"), MuMLP)
    assert isinstance(pizoo.load(f"{ADDRESS}@other"), MuMLP)
    pizoo.publish("digits_finpi", REPO)
    assert isinstance(pizoo.load(ADDRESS), FinPiMLP)
    assert torch.equal(logits(pizoo.load(ADDRESS, revision=first.commit), x), logits(pizoo.load(ENTRY), x))
    with pytest.raises(HubError, match="has no revision 'none'"):
        pizoo.load(ADDRESS, revision="none")
    with pytest.raises(ValueError, match="has a revision already"):
        pizoo.load(f"{ADDRESS}@other", revision="main")


def test_a_commit_in_the_cache_needs_no_connection(scene, x):
    commit = pizoo.publish(ENTRY, REPO).commit
    pizoo.load(ADDRESS, revision=commit)
    scene.hub.requests.clear()
    pizoo.load(ADDRESS, revision=commit)
    assert scene.hub.requests == []
    with scene.offline():
        assert torch.equal(logits(pizoo.load(ADDRESS, revision=commit), x), logits(pizoo.load(ENTRY), x))


def test_files_of_one_load_are_of_one_commit_whatever_is_pushed_meanwhile(scene, x):
    pizoo.publish(ENTRY, REPO)
    files = scene.hub.files(REPO)
    pizoo.publish("digits_mu", "me/other")

    def push(hub):
        hub.commit(REPO, "main", hub.files("me/other"))

    scene.hub.fail(r"HEAD .*/model\.safetensors", push)
    assert torch.equal(logits(pizoo.load(ADDRESS), x), logits(pizoo.load(ENTRY), x))
    assert scene.hub.files(REPO) != files and isinstance(pizoo.load(ADDRESS), MuMLP)


@pytest.mark.parametrize(
    "name", ["hf-hub:digits", "hf-hub:", "hf-hub:a/", "hf-hub:/b", "hf-hub:a/b@", "hf-hub:a/b/../c", "hf-hub:a/b//c"]
)
def test_an_address_of_another_form_is_refused(name):
    with pytest.raises(ValueError, match="does not name a repository of the Hub; it must be OWNER/NAME"):
        pizoo.load(name)


@pytest.mark.parametrize("entry", [ADDRESS, ENTRY])
def test_an_argument_that_does_not_exist_is_refused_wherever_the_net_is(entry, scene):
    with pytest.raises(TypeError, match="pretraned: no such option"):
        pizoo.load(entry, pretraned=True)
    with pytest.raises(TypeError, match="map_location: no such option"):
        InfPiMLP.from_pretrained(entry, map_location="cpu")


def test_an_address_is_written_as_it_is_read():
    for name in ("hf-hub:a/b", "hf-hub:a/b/full", "hf-hub:a/b@v1", "hf-hub:a/b/full@refs/pr/1"):
        assert str(Address.parse(name)) == name


def test_weights_are_looked_for_at_a_path_then_at_the_card_then_on_the_hub(scene, monkeypatch, caplog, tmp_path):
    """And the log says which it was."""
    caplog.set_level(logging.INFO, logger="pizoo")
    cards = tmp_path / "cards"
    shutil.copytree(zoo.card(ENTRY), cards / ENTRY)
    pizoo.publish(ENTRY, REPO)
    monkeypatch.setattr(zoo, "cards_dir", lambda: cards)
    monkeypatch.setenv("PIZOO_HUB", "me")
    scene.hub.requests.clear()

    def log_of(name):
        caplog.clear()
        pizoo.load(name)
        return caplog.messages[0]

    assert log_of(scene.training()) == f"{scene.training()}: the folder {scene.training()}"
    assert log_of(ENTRY) == f"{ENTRY}: its card, {cards / ENTRY}"
    assert scene.hub.requests == []
    (cards / ENTRY / checkpoint.MODEL).unlink()
    assert log_of(ENTRY).startswith(f"{ENTRY}: the Hub, {ADDRESS}")
    assert pizoo.verify(ENTRY, device="cpu").status == "verified"
    monkeypatch.delenv("PIZOO_HUB")
    with pytest.raises(zoo.WeightsNotFoundError, match="PIZOO_HUB"):
        pizoo.load(ENTRY)


def test_a_revision_of_an_entry_is_the_hubs_where_a_namespace_is_set(scene, monkeypatch):
    monkeypatch.setenv("PIZOO_HUB", "me")
    commit = pizoo.publish(ENTRY).commit
    assert list(scene.hub.repositories) == [REPO]
    assert isinstance(pizoo.load(ENTRY, revision=commit), InfPiMLP)
    assert hub.default_address("digits_nngp/tuned") == Address("me/digits-nngp", "tuned")


def test_an_untrained_net_takes_its_config_alone_from_the_hub(scene):
    pizoo.publish(ENTRY, REPO)
    assert pizoo.load(ADDRESS, pretrained=False).config == zoo.config(ENTRY)
    assert [path.name for path in scene.cache.rglob("snapshots/*/*")] == ["config.json"]


# Other libraries' names


def test_timm_creates_the_same_net_from_the_hub_and_from_a_folder(scene, x):
    pizoo.publish(ENTRY, REPO)
    wanted = logits(pizoo.load(ENTRY), x)
    for name in (ADDRESS, f"{ADDRESS}@main", f"local-dir:{zoo.card(ENTRY)}"):
        assert torch.equal(logits(timm.create_model(name, pretrained=True).eval(), x), wanted)
        assert timm.create_model(name, pretrained=True, num_classes=3)(x).shape == (5, 3)
    untrained = timm.create_model(ADDRESS)
    assert untrained.output.count < pizoo.load(ENTRY).output.count
    data = timm.data.resolve_model_data_config(timm.create_model(ADDRESS, pretrained=True))
    assert tuple(data["input_size"]) == (1, 8, 8) and tuple(data["mean"]) == (0.305,)


def test_from_pretrained_takes_a_repository_a_folder_or_an_entry(scene, x):
    pizoo.publish(ENTRY, REPO)
    wanted = logits(pizoo.load(ENTRY), x)
    for name in (REPO, ADDRESS, zoo.card(ENTRY), ENTRY):
        assert torch.equal(logits(InfPiMLP.from_pretrained(name), x), wanted)
    assert InfPiMLP.from_pretrained(REPO, dtype=torch.float64, revision="main").input.A.dtype == torch.float64
    with pytest.raises(TypeError, match=r"holds a InfPiMLP; MuMLP\.from_pretrained loads no other"):
        MuMLP.from_pretrained(REPO)


@pytest.mark.parametrize("entry", ["digits_infpi", "digits_finpi", "digits_mu"])
def test_save_pretrained_writes_what_pizoo_loads(entry, scene, tmp_path, x):
    model = pizoo.load(entry)
    model.reset_classifier(3)
    model.train().save_pretrained(tmp_path / "mine")
    assert model.training
    loaded = pizoo.load(tmp_path / "mine")
    assert torch.equal(logits(loaded, x), logits(model, x)) and loaded.config["num_classes"] == 3
    assert not (tmp_path / "mine" / "pytorch_model.bin").exists()
    pizoo.publish(tmp_path / "mine", "me/mine")
    assert torch.equal(logits(type(model).from_pretrained("me/mine"), x), logits(model, x))


def test_push_to_hub_publishes_a_net_of_ones_own_in_one_commit(scene):
    model = FinPiMLP(5, 3, width=16, r=4)
    model.push_to_hub("me/mine")
    assert len(scene.hub.repositories["me/mine"].commits) == 2
    x = torch.randn(4, 5)
    assert torch.equal(logits(FinPiMLP.from_pretrained("me/mine"), x), logits(model, x))
    assert torch.equal(logits(pizoo.load("hf-hub:me/mine"), x), logits(model, x))


# Command line


def test_publishing_and_verifying_from_the_command_line(scene, pizoo_command):
    done = pizoo_command("publish", ENTRY, "--repo-id", REPO, "--dry-run")
    size = (zoo.card(ENTRY) / checkpoint.MODEL).stat().st_size
    assert done.code == 0 and f"{size:,}" in done.out and "would send" in done.out and not scene.hub.repositories
    done = pizoo_command("publish", ENTRY, "--repo-id", REPO, "--private")
    assert done.code == 0 and "commit" in done.out and scene.hub.repositories[REPO].private
    assert pizoo_command("verify", ADDRESS, "--device", "cpu").code == 0
    done = pizoo_command("verify", "hf-hub:me/none")
    assert done.code == 1 and "shows no repository me/none" in done.err and "Traceback" not in done.err
