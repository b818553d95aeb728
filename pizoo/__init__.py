"""pizoo: a model zoo of π-nets."""

__version__ = "0.1.0"
