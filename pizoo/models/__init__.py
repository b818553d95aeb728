"""Networks and kernel regressors of the zoo."""

from pizoo.models.base import PiNet
from pizoo.models.finite import FinPiMLP, MuMLP
from pizoo.models.infpi import InfPiMLP
from pizoo.models.kernel import KernelRegressor, NNGPRegressor, NTKRegressor

__all__ = ["FinPiMLP", "InfPiMLP", "KernelRegressor", "MuMLP", "NNGPRegressor", "NTKRegressor", "PiNet"]
