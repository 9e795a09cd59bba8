"""Training of one configuration: knows torch, not Optuna."""
