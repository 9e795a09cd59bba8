"""The replay laboratory: samplers and pruners searched again on recorded curves, in simulated time.

This package holds tables of recorded trials and the simulation. The samplers and pruners are those of `hpo.strategy`, and
they work on a storage of `hpo.storage`, as in a worker. Nothing here trains, and nothing is written to the study.
"""
