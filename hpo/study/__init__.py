"""One study as a whole: made, joined, controlled, read, exported.

Here live the study's identity, its status, its best trials, and what a person orders. The queries that read for people are
here too. So are studies that Optuna made without us, which are read and never written. Nothing here trains. How a single
trial is claimed and ended is in `hpo.queue`.
"""
