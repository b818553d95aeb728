"""Recipes: the published settings stand in the files, and nothing a file can get wrong goes unsaid."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
import torch

from pizoo import models, recipes
from pizoo.optim import PiSGD, param_groups
from pizoo.recipes import Recipe, RecipeError, decisive, list_recipes, load_recipe

KINDS = ("finpi", "infpi", "mu", "nngp", "ntk")
DATA = ("cifar10", "digits", "omniglot")

MINIMAL = """
entry: mine
description: my own
model: {kind: infpi, r: 8}
data: {name: mine, path: mine.npz, classes: 3, input_size: [5], scale: 1.0}
train: {epochs: 2, batch_size: 4, lr: 0.1}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, file: str = "mine.yaml"):
        (tmp_path / file).write_text(text)
        return tmp_path / file

    return write


# The zoo's recipes


def test_every_entry_has_a_recipe_that_names_itself():
    transferred = [f"{data}_{net}" for data in SOURCES for net in PUBLISHED_FEATURES]
    assert list_recipes() == sorted([f"{data}_{kind}" for data in DATA for kind in KINDS] + transferred)
    for entry in list_recipes():
        recipe = load_recipe(entry)
        assert recipe.entry == entry
        assert entry.split("_")[1] == recipe.model.kind


# Entry: published accuracy; width, r; batch size, lr, clip, milestone, weight decay; multipliers first and last; alphas
# bias, first, last.
PUBLISHED_NETS = {
    "cifar10_mu": (61.31, 2048, None, 32, 1.0, 0.10, 40, 1.6e-4, 0.2, 16, 4, 2, 0.25),
    "cifar10_finpi": (60.64, 2048, 400, 32, 0.5, 3.2, 35, 1.6e-4, 0.2, 8, 4, 0.125, 0.5),
    "cifar10_infpi": (61.50, None, 400, 8, 1.0, 0.4, 40, 1e-5, 0.1, 4, 0.5, 1, 0.5),
}


@pytest.mark.parametrize("entry", PUBLISHED_NETS)
def test_the_published_nets_are_trained_with_the_published_settings(entry):
    recipe = load_recipe(entry)
    model, train = recipe.model, recipe.train
    assert (
        recipe.published.accuracy,
        getattr(model, "width", None),
        getattr(model, "r", None),
        train.batch_size,
        train.lr,
        train.clip.max_norm,
        *train.schedule.milestones,
        train.weight_decay,
        train.first_layer_lr_mult,
        train.last_layer_lr_mult,
        model.bias_alpha,
        model.first_layer_alpha,
        model.last_layer_alpha,
    ) == PUBLISHED_NETS[entry]
    assert model.hidden_layers == 2 and model.last_bias_alpha is None
    assert (train.epochs, train.seed, train.momentum, train.dtype, train.loss) == (50, 0, 0, "float16", "cross_entropy")
    assert train.bias_lr_mult == 0.5 and not train.apply_lr_mult_to_wd
    assert train.schedule.name == "multistep" and train.schedule.gamma == 0.15
    assert train.clip.per_param and train.clip.follows_schedule


@pytest.mark.parametrize(("entry", "accuracy"), [("cifar10_nngp", 58.92), ("cifar10_ntk", 59.63)])
def test_the_published_kernels_have_the_printed_settings(entry, accuracy):
    recipe = load_recipe(entry)
    model = recipe.model
    assert (recipe.published.accuracy, recipe.train) == (accuracy, None)
    assert (model.depth, model.var_w, model.var_b, model.ridge) == (2, 1, 0, 1e-4)
    if model.kind == "ntk":
        assert model.first_layer_lr_mult == model.last_layer_lr_mult == model.bias_lr_mult == 1


SOURCES = ("imagenet32", "tinyimagenet32")
# Net: published accuracy; width, r; lr, clip, weight decay; alpha bias, multiplier first; epoch and ridge.
PUBLISHED_FEATURES = {
    "mu": (61.84, 2048, None, 0.005, None, 0.008, 4, 0.553341, 32, 1e-4),
    "finpi_r200": (58.02, 2048, 200, 0.028284, 0.4, 1.77e-4, 0.353553, 1.524828, 27, 1e-4),
    "finpi_r400": (59.36, 2048, 400, 0.05, 0.8, 5e-4, 0.707107, 0.612372, 31, 1e-3),
    "infpi_r200": (64.39, None, 200, 0.01, None, 1e-4, 0.5, 1, 26, 1e-4),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("net", PUBLISHED_FEATURES)
def test_features_for_transfer_are_trained_with_the_published_settings(source, net):
    recipe = load_recipe(f"{source}_{net}")
    model, train, transfer = recipe.model, recipe.train, recipe.transfer
    published, *settings = PUBLISHED_FEATURES[net]
    assert (
        getattr(model, "width", None),
        getattr(model, "r", None),
        train.lr,
        train.clip.max_norm,
        train.weight_decay,
        model.bias_alpha,
        train.first_layer_lr_mult,
        transfer.epoch,
        transfer.ridge,
    ) == tuple(settings)
    assert (recipe.published and recipe.published.accuracy) == (published if source == "imagenet32" else None)
    assert (model.hidden_layers, model.first_layer_alpha, model.last_layer_alpha, model.last_bias_alpha) == (
        2,
        1,
        1,
        None,
    )
    assert (train.epochs, train.batch_size, train.momentum, train.schedule.name) == (40, 16, 0, "constant")
    assert (train.bias_lr_mult, train.last_layer_lr_mult, train.apply_lr_mult_to_wd) == (0.5, 1, True)
    assert train.clip.per_param and train.loss == "cross_entropy"
    assert recipe.data.classes == {"imagenet32": 250, "tinyimagenet32": 200}[source]
    assert recipe.data.mean == (0.485, 0.456, 0.406)  # the source's own constants, and the target's:
    assert transfer.data == load_recipe("cifar10_mu").data
    assert transfer.ridge in transfer.ridges and transfer.measured_after(transfer.epoch, 40)


# Entry: published accuracy; width, r; meta learning rate, inner step size, clip; alphas bias and first; initial scales.
PUBLISHED_LEARNERS = {
    "omniglot_mu": (91.22, 2048, None, 4.0, 0.594604, 0.15, 0.5, 0.594604, (0.840896, 0.594604)),
    "omniglot_finpi": (92.21, 2048, 400, 5.656854, 0.25, 0.282843, 2.828427, 1, None),
    "omniglot_infpi": (91.46, None, 400, 32.0, 0.353553, 0.1, 1.414214, 1, None),
}


@pytest.mark.parametrize("entry", PUBLISHED_LEARNERS)
def test_the_published_learners_are_trained_with_the_published_settings(entry):
    recipe = load_recipe(entry)
    model, train, tasks = recipe.model, recipe.train, recipe.tasks
    assert (
        recipe.published.accuracy,
        getattr(model, "width", None),
        getattr(model, "r", None),
        train.lr,
        tasks.step_size,
        train.clip.max_norm,
        model.bias_alpha,
        model.first_layer_alpha,
        getattr(model, "initial_scales", None),
    ) == PUBLISHED_LEARNERS[entry]
    assert (model.hidden_layers, model.last_bias_alpha, model.last_layer_alpha) == (2, 0, 1) and model.readout_zero_init
    assert (train.epochs, train.steps_per_epoch, train.batch_size, train.dtype) == (50, 1000, 8, "float16")
    assert (train.first_layer_lr_mult, train.last_layer_lr_mult, train.bias_lr_mult) == (0.4, 0, 1)
    assert train.schedule.name == "cosine" and not train.clip.per_param and not train.clip.follows_schedule
    assert train.weight_decay == train.momentum == 0
    assert (tasks.shots, tasks.queries, tasks.steps, tasks.layers, tasks.first_order) == (1, 1, 1, "readout", False)
    assert (tasks.headline, tasks.test_tasks, recipe.data.classes, recipe.data.d) == ("test", 8000, 5, 784)


@pytest.mark.parametrize(("entry", "accuracy"), [("omniglot_nngp", 43.80), ("omniglot_ntk", 51.72)])
def test_the_published_kernel_learners_have_the_printed_settings(entry, accuracy):
    recipe = load_recipe(entry)
    model, tasks = recipe.model, recipe.tasks
    assert (recipe.published.accuracy, recipe.train, model.ridge) == (accuracy, None, None)
    assert (model.depth, model.var_w, model.var_b, tasks.step_size) == (2, 1, 1, 0.5)
    assert tasks.headline == "validation_rotated" and "rotations" in recipe.published.protocol


BAD_TASKS = {
    ("omniglot_nngp", "model.ridge=0.1"): "model.ridge: found 0.1; must be left out with tasks",
    ("digits_nngp", "model.ridge=null"): "model.ridge: missing; must be given without tasks",
    ("omniglot_mu", "train.steps_per_epoch=null"): "train.steps_per_epoch: missing; must be given with tasks",
    ("digits_mu", "train.steps_per_epoch=5"): "train.steps_per_epoch: found 5; must be left out without tasks",
    ("omniglot_mu", "tasks=null"): "train.steps_per_epoch: found 1000; must be left out without tasks",
    ("digits_nngp", "tasks={step_size: 1.0}"): "model.ridge: found 0.0001; must be left out with tasks",
    ("omniglot_mu", "data.path=mine.npz"): "data.name: found 'omniglot' with a path; must be 'omniglot' without",
    ("digits_mu", "data.name=omniglot"): "tasks: missing; must be given for omniglot",
    ("omniglot_mu", "train.loss=mse"): "train.loss: found 'mse'; must be 'cross_entropy' with tasks",
    ("omniglot_mu", "data.scale=1.0"): "data.scale: found 1.0; must be left out with tasks",
    ("omniglot_mu", "data={mean: [0.5], std: [1.0]}"): "data.mean: found (0.5,); must be left out with tasks",
    ("omniglot_mu", "data.subset=5"): "data.subset: found 5; must be left out with tasks",
    ("omniglot_ntk", "tune={validation: 0.2, grid: {depth: [2, 3]}}"): "tune: must be left out with tasks",
    ("omniglot_mu", "tasks.layers=all"): "tasks.first_order: found false; must be true with layers all",
    ("omniglot_mu", "tasks.step_size=0"): "tasks.step_size: found 0; must be greater than 0",
    ("omniglot_mu", "tasks.headline=train"): "tasks.headline: found 'train'; ",
    ("omniglot_mu", "model.initial_scales=[1, 1, 1, 1]"): "must be at most one for each of 3 layers",
}


@pytest.mark.parametrize(("entry", "override"), BAD_TASKS)
def test_what_does_not_go_with_tasks_or_without_is_refused(entry, override):
    with pytest.raises(RecipeError) as error:
        load_recipe(entry, [override])
    assert BAD_TASKS[entry, override] in str(error.value)


def test_initial_scales_multiply_the_initial_weights():
    plain, scaled = (
        load_recipe("omniglot_mu", ["model.width=8", f"model.initial_scales={scales}"]).build_model()
        for scales in ("null", "[2.0, 0.5]")
    )
    for layer, other, factor in zip(plain.layers, scaled.layers, (2.0, 0.5, 1.0), strict=True):
        assert (factor * layer.weight == other.weight).all()
    assert "initial_scales" not in plain.hparams and scaled.hparams["initial_scales"] == [2.0, 0.5]


@pytest.mark.parametrize("kind", KINDS)
def test_entries_on_one_data_set_see_the_same_pixels(kind):
    cifar10, digits = load_recipe(f"cifar10_{kind}"), load_recipe(f"digits_{kind}")
    assert cifar10.data == load_recipe("cifar10_infpi").data and digits.data == load_recipe("digits_infpi").data
    assert (cifar10.data.d, cifar10.data.classes, cifar10.data.scale) == (3072, 10, 255)
    assert cifar10.data.mean == (0.49137255, 0.48235294, 0.44666667)
    assert cifar10.data.std == (0.24705882, 0.24352941, 0.26156863)
    assert (digits.data.d, digits.data.scale, digits.published) == (64, 16, None)
    assert "ICLR 2022" in cifar10.published.source and cifar10.tolerance.verify == 0.05


def test_the_digits_recipe_reads_and_normalises_the_digits():
    data = load_recipe("digits_infpi", ["data.split=3", "data.subset=100"]).data
    dataset = data.load()
    assert len(dataset.train_x) == 100 and len(dataset.test_x) == 449
    x = load_recipe("digits_infpi").data.load().train_x
    x = load_recipe("digits_infpi").data.normalize(x)
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02


def test_architectures_have_timms_names():
    names = {entry: load_recipe(entry).architecture for entry in list_recipes() if entry.startswith("cifar10")}
    assert names == {
        "cifar10_finpi": "finpi_mlp_w2048_r400",
        "cifar10_infpi": "infpi_mlp_r400",
        "cifar10_mu": "mu_mlp_w2048",
        "cifar10_nngp": None,
        "cifar10_ntk": None,
    }
    assert load_recipe("cifar10_infpi", ["model.r=50", "model.hidden_layers=3"]).architecture == "infpi_mlp_r50_l3"


@pytest.mark.parametrize("entry", [f"{data}_{kind}" for data in DATA for kind in KINDS])
def test_a_recipe_survives_json(entry):
    recipe = load_recipe(entry)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_a_recipe_is_a_value():
    recipe = load_recipe("digits_mu")
    assert recipe == load_recipe("digits_mu") and hash(recipe) == hash(load_recipe("digits_mu"))
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.lr = 3.0


def test_importing_pizoo_does_not_read_recipes():
    code = "import sys, pizoo; sys.exit('pizoo.recipes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("entry", [f"{data}_{kind}" for data in DATA for kind in KINDS])
def test_the_model_part_has_the_names_of_the_constructors_arguments(entry):
    recipe = load_recipe(entry)
    arguments = recipe.model.model_dump(exclude={"kind"})
    make = {
        "infpi": models.InfPiMLP,
        "finpi": models.FinPiMLP,
        "mu": models.MuMLP,
        "nngp": models.NNGPRegressor,
        "ntk": models.NTKRegressor,
    }
    if recipe.tasks is not None:
        make |= {"nngp": models.NNGPLearner, "ntk": models.NTKLearner}
    make = make[recipe.model.kind]
    inspect.signature(make).bind(recipe.data.d, recipe.data.classes, **arguments)


# Files of one's own


def test_a_file_needs_only_what_has_no_default(write):
    recipe = load_recipe(write(MINIMAL))
    assert recipe.data.d == 5 and recipe.data.normalize.mean is None
    assert recipe.train.schedule.name == "constant" and recipe.train.clip.max_norm is None
    assert recipe.train.apply_lr_mult_to_wd and recipe.train.dtype == "float32"
    assert (recipe.tolerance.verify, recipe.tolerance.reproduce) == (0.05, 1.0)


def test_a_file_states_what_differs_from_an_entry(write):
    text = "extends: cifar10_infpi\nentry: mine\ndescription: mine\ntrain: {lr: 0.25, clip: {max_norm: null}}"
    mine, theirs = load_recipe(write(text)), load_recipe("cifar10_infpi")
    assert mine.train.lr == 0.25 and mine.train.clip.max_norm is None and mine.train.clip.per_param
    assert mine.model == theirs.model and mine.data == theirs.data and mine.train.schedule == theirs.train.schedule


def test_a_published_number_belongs_to_the_entry_that_states_it(write):
    assert load_recipe(write("extends: cifar10_infpi\nentry: mine\ndescription: mine")).published is None
    with pytest.raises(RecipeError, match="entry: missing"):
        load_recipe(write("extends: cifar10_infpi\ndescription: mine"))


def test_a_description_may_be_left_out_where_there_is_one_to_point_to(write):
    assert load_recipe(write("extends: cifar10_infpi\nentry: mine")).description == "After the recipe cifar10_infpi"
    with pytest.raises(RecipeError, match="description: missing"):
        load_recipe(write(MINIMAL.replace("description: my own\n", "")))


def test_what_an_entrys_number_is_over_is_not_passed_on(write):
    mine = load_recipe(write("extends: digits_infpi\nentry: mine\ndescription: mine"))
    assert mine.seeds == 1 and mine.tolerance.reason is None


def test_a_file_can_extend_a_file_beside_it(write, tmp_path):
    write(MINIMAL, "base.yaml")
    path = write("extends: base.yaml\nentry: child\ndescription: child\ntrain: {epochs: 9}")
    assert load_recipe(path).train.epochs == 9 and load_recipe(path).train.batch_size == 4
    with pytest.raises(RecipeError, match=r"mine\.yaml: extends: found 'gone\.yaml'; there is no file"):
        load_recipe(write("extends: gone.yaml"))


def test_naming_another_kind_replaces_what_the_old_one_stated(write):
    text = "extends: cifar10_finpi\nentry: mine\ndescription: mine\nmodel: {kind: infpi, r: 7}"
    assert load_recipe(write(text)).model.bias_alpha == 1.0
    assert load_recipe("cifar10_infpi", ["train.schedule.name=cosine"]).train.schedule.name == "cosine"


def test_a_milestone_never_reached_is_no_error():
    assert load_recipe("cifar10_infpi", ["train.epochs=1"]).train.schedule.milestones == (40,)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", ".001", "0.001", "+1e-3"])
def test_numbers_are_read_as_numbers(text):
    assert load_recipe("digits_mu", [f"train.lr={text}"]).train.lr == 1e-3


def test_overrides_come_last_and_in_order(write):
    recipe = load_recipe(write(MINIMAL), ["train.lr=1", "train.clip={max_norm: 0.5}", "train.lr=2", "data.subset=10"])
    assert (recipe.train.lr, recipe.train.clip.max_norm, recipe.data.subset) == (2, 0.5, 10)


# What is refused. Each case: the override, and what the message has to say.

REFUSED = {
    "train.epoch=1": "train.epoch: unknown key; did you mean 'epochs'? allowed: apply_lr_mult_to_wd, batch_size",
    "model.rank=3": "model.rank: unknown key; allowed: bias_alpha",
    "model.last_layer_alfa=3": "model.last_layer_alfa: unknown key; did you mean 'last_layer_alpha'?",
    "train.schedule.milestone=[3]": "train.schedule.milestone: unknown key; did you mean 'milestones'?",
    "train.clip.norm=1": "train.clip.norm: unknown key; did you mean 'max_norm'?",
    "optimizer=adam": "optimizer: unknown key; allowed: compact, cost, data, description, differs",
    "extends=digits": "extends: unknown key",
    "epochs=3": "epochs: unknown key; did you mean 'train.epochs'?",
    "model.subset=3": "model.subset: unknown key; did you mean 'data.subset'?",
    "name=mine": "name: unknown key; did you mean 'data.name' or 'train.schedule.name'?",
    "train.lr='0.1'": "train.lr: found '0.1'; must be a valid number",
    "train.lr=true": "train.lr: found true; must be a valid number",
    "train.lr=fast": "train.lr: found 'fast'; must be a valid number",
    "train.lr=": "train.lr: found null; must be a valid number",
    "train.lr=.nan": "train.lr: found nan; must be a finite number",
    "train.lr=.inf": "train.lr: found inf; must be a finite number",
    "train.lr=0": "train.lr: found 0; must be greater than 0",
    "train.lr.max=1": "train.lr: found {'max': 1}; must be a valid number",
    "train.epochs=1.0": "train.epochs: found 1.0; must be a valid integer",
    "train.epochs=0": "train.epochs: found 0; must be greater than or equal to 1",
    "train.batch_size=-1": "train.batch_size: found -1; must be greater than",
    "train.momentum=1": "train.momentum: found 1; must be less than 1",
    "train.seed=-1": "train.seed: found -1; must be greater than",
    "train.seed=4294967296": "train.seed: found 4294967296; must be less than 4294967296",
    "train.dtype=int16": "train.dtype: found 'int16'; must be 'int8', 'float16', 'bfloat16', 'float32' or 'float64'",
    "train.loss=hinge": "train.loss: found 'hinge'; must be 'cross_entropy' or 'mse'",
    "train.clip=0.4": "train.clip: found 0.4; must be a mapping",
    "train.clip.max_norm=0": "train.clip.max_norm: found 0; must be greater than 0",
    "train.clip.per_param=1": "train.clip.per_param: found 1; must be a valid boolean",
    "train.weight_decay=1.5": "train.weight_decay: found 1.5; lr * weight_decay * multiplier = 1.0 * 1.5 * 1.0",
    "train.schedule.name=linear": "train.schedule.name: found 'linear'; must be one of 'constant', 'multistep', 'cosine'",
    "train.schedule.milestones=40": "train.schedule.milestones: found 40; must be a list",
    "train.schedule.milestones=[]": "train.schedule.milestones: found []; must have at least 1 item",
    "train.schedule.milestones=[a]": "train.schedule.milestones.0: found 'a'; must be a valid integer",
    "train.schedule.milestones=[30, 20]": "train.schedule.milestones: found [30, 20]; must be increasing",
    "train.schedule.milestones=[20, 20]": "train.schedule.milestones: found [20, 20]; must be increasing",
    "train.schedule.gamma=1.5": "train.schedule.gamma: found 1.5; must be less than or equal to 1",
    "train=null": "train: missing; must be given for a net (model.kind infpi)",
    "model.kind=resnet": "model.kind: found 'resnet'; must be one of 'infpi', 'finpi', 'mu', 'nngp', 'ntk'",
    "model.kind=mu": "model.width: missing",
    "model=resnet": "model: found 'resnet'; must be a mapping",
    "model.r=0": "model.r: found 0; must be greater than",
    "model.bias_alpha=-1": "model.bias_alpha: found -1; must be greater than or equal to 0",
    "data.name=imagenet": "data.name: found 'imagenet' without a path; did you mean 'imagenet32'?",
    "data.keep=[1, 2]": "data.keep: found 2 numbers; must be as many as classes, 10",
    "train.freeze=[input, hidden, readout]": "train.freeze: found ['input', 'hidden', 'readout']; must name one or two",
    "train.freeze=[input, input]": "train.freeze: found ['input', 'input']; must name one or two of input, hidden, readout",
    "train.freeze=[first]": "train.freeze.0: found 'first'",
    "transfer={data: {name: digits, classes: 10, input_size: [1, 8, 8]}, epoch: 1, ridge: 1, ridges: [1], epochs: [1]}": (
        "transfer.data.input_size: found [1, 8, 8]; must be that of the net, [3, 32, 32]"
    ),
    "transfer={data: {name: cifar10, classes: 10, input_size: [3, 32, 32]}, epoch: 1, ridge: 0, ridges: [1], epochs: [1]}": (
        "transfer.ridge: found 0; must be greater than 0"
    ),
    "data.name=cifar01": "data.name: found 'cifar01' without a path; did you mean 'cifar10'?",
    "data.classes=1": "data.classes: found 1; must be greater than or equal to 2",
    "data.input_size=[32, 32]": "data.input_size: found [32, 32]; must be [C, H, W] or [d]",
    "data.input_size=[1, 8, 8]": "data.mean: found [0.49137255, 0.48235294, 0.44666667]; must have one value per",
    "data.mean=[0.5]": "data.mean: found [0.5]; must have one value per channel, 3",
    "data.std=null": "data.std: found null; must be given",
    "data.std=[1, 0, 1]": "data.std.1: found 0; must be greater than 0",
    "data.scale=0": "data.scale: found 0; must be greater than 0",
    "data.split=3": "data.split: found 3; must be 0, only the digits have other splits",
    "data.subset=0": "data.subset: found 0; must be greater than",
    "published.accuracy=101": "published.accuracy: found 101; must be less than or equal to 100",
    "tolerance={verify: 1, reason: null}": "tolerance.reason: missing",
    "entry=a b": "entry: found 'a b'; must match",
    "differs=''": "differs: found ''; must have at least 1 character",
    "published.rerun=101": "published.rerun: found 101; must be less than or equal to 100",
    "tune={validation: 0.1, grid: {r: [1]}}": "tune: must be left out, a net (model.kind infpi) is trained, not solved",
    "tune={validation: 1, grid: {r: [1]}}": "tune.validation: found 1; must be less than 1",
    "train.lr": "override 'train.lr': must be KEY=VALUE",
    "=3": "override '=3': must be KEY=VALUE",
    "train..lr=3": "override 'train..lr=3': must be KEY=VALUE",
    "train.lr=[": "override 'train.lr=[' is not readable as YAML",
    "train.clip={per_param: true, per_param: true}": "duplicate key 'per_param'",
}


@pytest.mark.parametrize("override", REFUSED)
def test_an_impossible_value_is_refused_by_file_and_key(override):
    with pytest.raises(RecipeError) as error:
        load_recipe("cifar10_infpi", [override])
    assert REFUSED[override] in str(error.value)
    assert "cifar10_infpi.yaml" in str(error.value) or "override" in str(error.value)


def test_momentum_takes_weight_decay_with_its_multipliers_or_not_at_all():
    momentum = ["train.momentum=0.9", "train.weight_decay=0.001"]
    with pytest.raises(RecipeError, match=r"train\.apply_lr_mult_to_wd: found false; must be true with momentum 0\.9"):
        load_recipe("digits_infpi", momentum)
    for allowed in (
        ["train.apply_lr_mult_to_wd=true"],
        [f"train.{layer}_lr_mult=1.0" for layer in ("first_layer", "last_layer", "bias")],
    ):
        recipe = load_recipe("digits_infpi", [*momentum, *allowed])
        model, train = recipe.build_model(), recipe.train
        mults = (train.first_layer_lr_mult, train.last_layer_lr_mult, train.bias_lr_mult)
        groups = param_groups(model, train.lr, train.weight_decay, *mults, train.apply_lr_mult_to_wd)
        PiSGD(groups, train.lr, train.momentum)  # takes what the recipe allows


def test_the_multiplier_counts_where_it_applies_to_weight_decay(write):
    decay = ["train.weight_decay=0.5", "train.lr=1", "train.last_layer_lr_mult=2"]
    with pytest.raises(RecipeError, match=r"1\.0 \* 0\.5 \* 2\.0 must be below 1"):
        load_recipe(write(MINIMAL), decay)
    assert load_recipe(write(MINIMAL), [*decay, "train.apply_lr_mult_to_wd=false"]).train.weight_decay == 0.5


def test_int8_is_for_the_rows_of_growing_layers():
    assert load_recipe("cifar10_infpi", ["train.dtype=int8"]).build_model().output.A.dtype == torch.int8
    with pytest.raises(
        RecipeError, match=r"train\.dtype: found 'int8', which is for rows of growing layers; a mu has none"
    ):
        load_recipe("cifar10_mu", ["train.dtype=int8"])


def test_a_finite_net_has_a_width_of_at_least_its_rank():
    with pytest.raises(RecipeError, match=r"model\.width: found 2048; must be at least r, 4000"):
        load_recipe("cifar10_finpi", ["model.r=4000"])


def test_a_kernel_has_a_ridge_and_no_training():
    with pytest.raises(RecipeError, match=r"model\.ridge: found 0; must be greater than 0"):
        load_recipe("digits_ntk", ["model.ridge=0"])
    with pytest.raises(RecipeError, match=r"train: found .*; must be left out, kernel regressors \(model\.kind ntk\)"):
        load_recipe("digits_ntk", ["train.epochs=1"])


def test_a_grid_holds_values_that_the_model_takes():
    for grid, message in (
        ("{depht: [2]}", "tune.grid.depht: unknown key; did you mean 'depth'?"),
        ("{depth: [2, 2.5]}", "tune.grid.depth: found 2.5; model.depth does not take it"),
        ("{ridge: [0.1, 0]}", "tune.grid.ridge: found 0; model.ridge does not take it"),
        ("{depth: 2}", "tune.grid.depth: found 2; must be a list"),
        ("{}", "tune.grid: found {}; must have at least 1 item"),
    ):
        with pytest.raises(RecipeError) as error:
            load_recipe("digits_nngp", [f"tune={{validation: 0.2, grid: {grid}}}"])
        assert message in str(error.value)


@pytest.mark.parametrize("entry", ["cifar10_nngp", "cifar10_ntk"])
def test_the_printed_settings_are_among_those_a_kernel_is_tuned_over(entry):
    """So the tuned one cannot be worse on the held-out images."""
    recipe = load_recipe(entry)
    printed = recipe.model.model_dump()
    assert {key: printed[key] for key in recipe.tune.grid} in recipe.tune.settings
    other = recipe.with_model(depth=3)
    assert other.model == recipe.model.model_copy(update={"depth": 3}) and other.data == recipe.data
    assert (other.tune, other.differs, other.published.rerun) == (None, None, None)


def test_texts_and_numbers_to_compare_with_decide_no_training():
    recipe = load_recipe("cifar10_nngp")
    told = load_recipe("cifar10_nngp", ["description=x", "differs=x", "tune=null", "seeds=2", "published=null"])
    other = load_recipe("cifar10_nngp", ["model.ridge=0.5"])
    assert decisive(recipe.to_dict()) == decisive(told.to_dict()) != decisive(other.to_dict())


def test_all_that_is_wrong_is_said_at_once(write):
    path = write(MINIMAL.replace("epochs: 2", "epochs: two").replace("r: 8", "rr: 8"))
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    for part in (str(path), "model.r: missing", "model.rr: unknown key", "train.epochs: found 'two'"):
        assert part in str(error.value)


def test_an_unknown_entry_offers_the_nearest(write):
    with pytest.raises(RecipeError, match="no recipe is called 'cifar10_infpy'; did you mean 'cifar10_infpi'"):
        load_recipe("cifar10_infpy")
    with pytest.raises(RecipeError, match="no recipe is called 'zzz'; `pizoo list` shows the entries"):
        load_recipe("zzz")
    with pytest.raises(RecipeError, match=r"mine\.yaml: extends: .* 'cifer10'; did you mean 'cifar10'"):
        load_recipe(write("extends: cifer10"))
    with pytest.raises(RecipeError, match=r"extends: no recipe or common part is called \[1\]"):
        load_recipe(write("extends: [1]"))


@pytest.mark.parametrize("key", ["extend", "exends", "Extends"])
def test_extends_misspelt_is_all_that_is_complained_of(write, key):
    path = write(f"{key}: digits_infpi\nentry: mine\ntrain: {{epochs: 3}}")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value) == f"{path.resolve()}: {key}: unknown key; did you mean 'extends'?"
    # Beside the right one it is a key like any other, and so is what is nearer to another.
    for text, near in ((f"extends: digits_infpi\n{key}: a", "allowed: "), (f"{MINIMAL}\nseed: 3", "'seeds'")):
        with pytest.raises(RecipeError, match=rf"unknown key; .*{near}"):
            load_recipe(write(text))


@pytest.mark.parametrize("path", ["nowhere/mine.yaml", "nowhere.yml", "nowhere/mine"])
def test_a_file_that_is_not_there_is_named(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=path):
        load_recipe(str(tmp_path / path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("entry: a\nentry: b", r"duplicate key 'entry'[\s\S]*line 2"),
        ("train: {lr: 1, lr: 2}", "duplicate key 'lr'"),
        ("entry: [", "is not readable as YAML"),
        ("entry: !!python/object/apply:os.getcwd []", "is not readable as YAML: could not determine a constructor"),
        ("[" * 10000, "is not readable as YAML"),
        ("\0", "is not readable as YAML"),
        ("? [a]\n: 1", "is not readable as YAML"),
        ("entry: 2020-13-45", "is not readable as YAML"),
        ("- a\n- b", r"found \['a', 'b'\]; must be a mapping"),
        ("", "found null; must be a mapping"),
        (MINIMAL + "7: x", "7: unknown key"),
        ("extends: mine.yaml", "a circle"),
    ],
)
def test_a_broken_file_is_refused_by_name(write, text, message):
    path = write(text)
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"entry: \xff\xfe")
    with pytest.raises(RecipeError, match=r"mine\.yaml is not readable as YAML"):
        load_recipe(tmp_path / "mine.yaml")


def test_a_dict_is_checked_like_a_file():
    with pytest.raises(RecipeError, match=r"config\.json: nonsense: unknown key"):
        Recipe.from_dict(load_recipe("digits_mu").to_dict() | {"nonsense": 1}, source="config.json")
    with pytest.raises(RecipeError, match="recipe: found 3; must be a mapping"):
        Recipe.from_dict(3)


def test_an_installed_package_carries_its_recipes(tmp_path, monkeypatch):
    # A package of that name beside an installed pizoo is not the zoo's.
    (tmp_path / "recipes").mkdir()
    monkeypatch.setattr("pizoo.__file__", str(tmp_path / "pizoo" / "__init__.py"))
    assert recipes.recipes_dir() == tmp_path / "pizoo" / "_recipes"
    (tmp_path / "recipes" / "common").mkdir()
    assert recipes.recipes_dir() == tmp_path / "recipes"


@pytest.mark.parametrize(
    ("override", "comparable"),
    [
        ("train.seed=3", True),
        ("train.epochs=50", True),
        ("seeds=7", True),
        ("train.epochs=3", False),
        ("model.r=100", False),
    ],
)
def test_a_recipe_that_makes_another_net_is_not_compared_with_the_papers_number(override, comparable):
    recipe = load_recipe("cifar10_infpi", [override])
    assert (recipe.published is not None) == (recipe.differs is not None) == comparable
    own = load_recipe("cifar10_infpi", [override, "published={accuracy: 12, source: s, protocol: p}"])
    assert own.published.accuracy == 12
