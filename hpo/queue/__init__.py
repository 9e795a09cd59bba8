"""Trials as leased jobs in the database.

This package has claims, leases, reports, records of checkpoints, ends, commands of people, and the reaper of expired
leases. Each operation of a worker is one guarded transaction. Nothing here trains a model or suggests parameters.
"""
