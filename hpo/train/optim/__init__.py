"""Optimizers, schedules, warm-ups, losses, averages and penalties, each by name.

A function's keyword-only parameters are its options in a study file. Steps of K runs at once are in `hpo.train.stack`.
"""
