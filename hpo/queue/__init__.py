"""Trials as leased jobs in the database.

Here live claims, leases, reports, checkpoints' records, ends, and the reaper of expired leases. Each verb is one guarded
transaction. Nothing here trains a model or chooses parameters.
"""
