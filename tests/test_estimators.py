"""Features and their kernel in scikit-learn's hands, on digits."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC

import pizoo
from pizoo.estimators import FeatureKernel, PiFeatures
from pizoo.models import InfPiMLP

ENTRIES = pytest.mark.parametrize("entry", ["digits_infpi", "digits_finpi", "digits_mu"])


@pytest.fixture(scope="module")
def digits():
    """Raw pixels [n, 64] and labels: 400 to fit, 200 that the entries were not trained on to predict."""
    data = pizoo.data.load_dataset("digits")
    return data.train_x[:400].flatten(1), data.train_y[:400], data.test_x[:200].flatten(1), data.test_y[:200]


@ENTRIES
def test_the_kernel_is_the_nets_own_feature_kernel(entry, digits):
    net = pizoo.load(entry)
    x, y = (pizoo.zoo.preprocessing(net.config)(part.view(-1, 1, 8, 8)) for part in digits[::2])
    kernel = FeatureKernel(entry)
    np.testing.assert_allclose(kernel(digits[2], digits[0]), pizoo.feature_kernel(net, y, x), atol=1e-5)
    np.testing.assert_array_equal(kernel.fit(digits[0]).transform(digits[2]), kernel(digits[2], digits[0]))
    np.testing.assert_array_equal(kernel(digits[2]), kernel(digits[2], digits[2]))
    np.testing.assert_allclose(PiFeatures(entry).fit_transform(digits[2]), net.features(y).detach(), rtol=1e-6)
    images = digits[2].view(-1, 1, 8, 8)
    np.testing.assert_array_equal(kernel(images), kernel(digits[2]))


@ENTRIES
@pytest.mark.parametrize(
    "make",
    [
        lambda entry: SVC(kernel=FeatureKernel(entry), C=10),
        lambda entry: SVC(kernel=FeatureKernel(pizoo.load(entry)), C=10),
        lambda entry: make_pipeline(PiFeatures(entry), LogisticRegression(max_iter=200)),
    ],
)
def test_classifiers_take_it_and_predict_well(entry, make, digits):
    x, y, test_x, test_y = (part.numpy() for part in digits)
    assert clone(make(entry)).fit(x, y).score(test_x, test_y) > 0.95


def test_kernel_ridge_regression_is_the_packages_own(digits):
    x, y, test_x, test_y = (part.numpy() for part in digits)
    targets = np.eye(10)[y] - 0.5
    model = make_pipeline(FeatureKernel("digits_infpi"), KernelRidge(alpha=1e-2, kernel="precomputed")).fit(x, targets)
    scores = model.predict(test_x)
    kernel = FeatureKernel("digits_infpi")
    dual = pizoo.functional.solve_ridge(torch.tensor(kernel(x)), torch.tensor(targets), 1e-2)
    np.testing.assert_allclose(scores, kernel(test_x, x) @ dual.numpy(), atol=1e-8)
    assert (scores.argmax(1) == test_y).mean() > 0.97
    per_fold = cross_val_score(model, x, targets, cv=3)  # the kernel is refitted to the images of each fold
    assert len(per_fold) == 3 and per_fold.min() > 0.5
    search = GridSearchCV(model, {"kernelridge__alpha": [1e-2, 1e3]}, cv=2).fit(x, targets)
    assert search.best_params_ == {"kernelridge__alpha": 1e-2}


def test_a_net_of_ones_own_takes_inputs_as_they_are():
    torch.manual_seed(0)
    net, x = InfPiMLP(6, 2, r=4), torch.randn(5, 6)
    np.testing.assert_allclose(FeatureKernel(net)(x), pizoo.feature_kernel(net, x, dtype=torch.float64))


def test_a_net_saved_without_a_recipe_takes_inputs_as_they_are_too(tmp_path):
    torch.manual_seed(0)
    net, x = InfPiMLP(6, 2, r=4), torch.randn(5, 6)
    net.save_pretrained(tmp_path / "mine")
    for source in (tmp_path / "mine", pizoo.load(tmp_path / "mine")):
        np.testing.assert_allclose(FeatureKernel(source)(x), pizoo.feature_kernel(net, x, dtype=torch.float64))
        assert PiFeatures(source).fit_transform(x).shape == (5, 4)


def test_another_net_is_taken_where_another_is_set(digits):
    x = digits[0][:50]
    features, kernel = PiFeatures("digits_infpi").fit(x), FeatureKernel("digits_infpi").fit(x)
    for estimator in (features, kernel):
        estimator.set_params(net="digits_mu")
    np.testing.assert_array_equal(features.transform(x), PiFeatures("digits_mu").transform(x))
    with pytest.raises(NotFittedError):
        kernel.transform(x)  # with features of the net before
    np.testing.assert_array_equal(kernel.fit(x).transform(x), FeatureKernel("digits_mu")(x))


def test_inputs_of_another_size_and_what_has_no_features_are_refused():
    for estimator in (PiFeatures("digits_mu"), FeatureKernel("digits_mu")):
        with pytest.raises(ValueError, match=r"X has shape \[3, 63\]; it must be \[n, 64\]"):
            estimator.fit(np.zeros((3, 63)))
    with pytest.raises(TypeError, match="NNGPRegressor"):
        FeatureKernel("digits_nngp")(load_digits().data[:3])


def test_the_readmes_example_runs_and_its_three_classifiers_know_digits(capsys):
    readme = (Path(pizoo.__file__).parent.parent / "README.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "FeatureKernel" in block)
    exec(compile(code, "README.md", "exec"), {})
    accuracies = [float(line) for line in capsys.readouterr().out.split()]
    assert len(accuracies) == 3 and min(accuracies) > 0.97
