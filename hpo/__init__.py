"""Hyperparameter search for PyTorch around Optuna. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
