"""Samplers and pruners.

This package holds Optuna's samplers and pruners by name, faster versions of some of them, and checks for likely mistakes in a
valid study file. Nothing here imports torch or writes a lease.
"""
