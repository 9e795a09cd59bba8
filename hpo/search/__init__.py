"""Which parameters to try and which trials to stop: samplers and pruners.

Here live Optuna's samplers and pruners by name, our fast versions of some of them, and the checks of a search that is legal
and still likely a mistake. Nothing here imports torch or writes a lease.
"""
