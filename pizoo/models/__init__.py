"""Networks, kernel regressors and few-shot learners of the zoo."""

from pizoo.models.base import PiNet
from pizoo.models.finite import FinPiMLP, MuMLP
from pizoo.models.infpi import InfPiMLP
from pizoo.models.kernel import KernelLearner, KernelRegressor, NNGPLearner, NNGPRegressor, NTKLearner, NTKRegressor

__all__ = [
    "FinPiMLP",
    "InfPiMLP",
    "KernelLearner",
    "KernelRegressor",
    "MuMLP",
    "NNGPLearner",
    "NNGPRegressor",
    "NTKLearner",
    "NTKRegressor",
    "PiNet",
]
