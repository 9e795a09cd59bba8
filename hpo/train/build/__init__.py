"""Builds a run from a pinned config: parts by name, data, model, optimizer, executor.

It also measures a model's costs before training, keeps measurements of this machine, and does the dry run of `hpo
check`. It does not train a run to its end and does not write trials.
"""
