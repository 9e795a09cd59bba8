"""Hyperparameter search for PyTorch, built on Optuna. Importing this package imports nothing heavy."""

from hpo.api.loop import epochs, load_weights, resume, save
from hpo.api.program import report
from hpo.api.search import open_study as open
from hpo.api.search import search
from hpo.api.study import BestTrial, Study
from hpo.errors import CheckpointError, HpoError, MismatchError, SpecError, StorageError, StudyError

__all__ = [
    "BestTrial",
    "CheckpointError",
    "HpoError",
    "MismatchError",
    "SpecError",
    "StorageError",
    "Study",
    "StudyError",
    "epochs",
    "load_weights",
    "open",
    "report",
    "resume",
    "save",
    "search",
]
__version__ = "0.1.0"
