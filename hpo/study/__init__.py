"""One study as a whole: made, joined, controlled, read, exported.

Here live the study's identity, its status, its best trials, and a person's commands. All SQL of this package stands in
the package `query`, which only reads. The statements that write are in `hpo.storage` and `hpo.queue`. Studies that Optuna
made are here too: they are read and never written. Nothing here trains. How a trial is claimed and ended is in `hpo.queue`.
"""
