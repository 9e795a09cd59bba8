"""Training of one configuration, or of several as one model.

This package has the run, the loop, validation, monitors and checkpoint files. `optim` has optimizers, schedules and
losses. `stack` trains K runs as one model. `build` makes a run from a config. Nothing here knows Optuna, a database or
a trial.
"""
