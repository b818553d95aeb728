"""A net's features and their kernel for scikit-learn.

::

    svm = SVC(kernel=FeatureKernel("digits_infpi"))
    regression = make_pipeline(FeatureKernel("digits_infpi"), KernelRidge(kernel="precomputed"))
    readout = make_pipeline(PiFeatures("digits_infpi"), LogisticRegression())

scikit-learn is imported with this module, and by nothing else of pizoo but tests.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from pizoo import kernels, zoo
from pizoo.evaluation.features import features
from pizoo.models import PiNet


class _OfNet(TransformerMixin, BaseEstimator):
    """What both estimators have: a net, and inputs [n, ...] made into its features."""

    def __init__(self, net: str | os.PathLike | PiNet):
        self.net = net

    def _inputs(self, x) -> Tensor:
        """Arrays [n, d] or [n, C, H, W] as a tensor; a net is loaded when first asked for."""
        if not hasattr(self, "net_") or self.loaded_ is not self.net:
            self.net_, self.loaded_ = self.net if isinstance(self.net, PiNet) else zoo.load(self.net), self.net
            vars(self).pop("features_", None)  # of another net
        x, d = torch.as_tensor(np.asarray(x)), self.net_.d_in
        if x.ndim < 2 or math.prod(x.shape[1:]) != d:
            raise ValueError(f"X has shape {list(x.shape)}; it must be [n, {d}], or images of so many pixels")
        return x

    def _features(self, x) -> Tensor:
        """Arrays [n, d] or [n, C, H, W] -> features in float64 [n, num_features]."""
        x = self._inputs(x)
        config = getattr(self.net_, "config", {})
        if "recipe" not in config:
            return features(self.net_, x, dtype=torch.float64, normalize=Tensor.to)
        x = x.reshape(len(x), *config["recipe"]["data"]["input_size"])
        return features(self.net_, x, dtype=torch.float64, normalize=zoo.preprocessing(config))


class PiFeatures(_OfNet):
    """The features of a net as a transformer: what its read-out takes, [n, num_features] in float64.

    Args:
        net: an entry's name, a checkpoint's folder, or a net; see :class:`FeatureKernel`.
    """

    def fit(self, X, y=None) -> PiFeatures:
        """Load the net and check that inputs are of its size; nothing is learned."""
        self._inputs(X)
        return self

    def transform(self, X) -> np.ndarray:
        """Inputs [n, d] or [n, C, H, W] -> [n, num_features].

        Raises:
            ValueError: inputs of another size than the net's.
        """
        return self._features(X).cpu().numpy()


class FeatureKernel(_OfNet):
    """The feature kernel of a net: callable, as ``SVC`` takes a kernel, and a transformer to kernels with what it was fitted
    on, for whatever takes ``kernel="precomputed"``.

    Args:
        net: an entry's name, a checkpoint's folder, or a net. Of what :func:`pizoo.load` gives, inputs are raw pixels,
            normalised as its recipe says; of any other net, and of one without a recipe, they are taken as they are.
    """

    def __call__(self, X, Y=None) -> np.ndarray:
        """Inputs [n, ...], [m, ...] (None: X) -> their kernel [n, m] in float64.

        Raises:
            ValueError: inputs of another size than the net's.
            NotEnoughMemory: a kernel that does not fit, with its size.
        """
        x = self._features(X)
        return self._kernel(x, x if Y is None or Y is X else self._features(Y))

    def fit(self, X, y=None) -> FeatureKernel:
        """Keep the features of the training inputs."""
        self.features_ = self._features(X)
        return self

    def transform(self, X) -> np.ndarray:
        """Inputs [n, ...] -> their kernel with the training inputs [n, n_train]."""
        x = self._features(X)
        check_is_fitted(self, "features_")
        return self._kernel(x, self.features_)

    def _kernel(self, x: Tensor, y: Tensor) -> np.ndarray:
        kernels.check_memory(len(x), len(y), x.element_size(), x.device)
        return kernels.matrix(self.net_.feature_kernel, x, y).cpu().numpy()
