"""A pinned config becomes a run: parts by name, data, model, optimizer, executor.

Here also live the costs of a model before training, what was measured on this machine, and the dry run of `hpo check`.
Nothing here trains a run to its end or writes a trial.
"""
