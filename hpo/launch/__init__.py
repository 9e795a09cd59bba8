"""Worker processes on this machine: start, watch, restart, stop; and their logs.

Nothing here imports torch or opens a GPU. The work of a worker is in `hpo.worker`.
"""
