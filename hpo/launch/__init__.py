"""Worker processes on this machine: started, watched, restarted, stopped; and their logs.

Nothing here imports torch or opens a GPU. What a worker does is in `hpo.worker`.
"""
