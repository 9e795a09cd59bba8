"""The process that trains: claim trials, train them, report and finish, until nothing is left.

This package has the worker's loop, its two threads, the trial that an objective gets, and checkpoints. SQL is in
`hpo.queue`. How worker processes are started is in `hpo.launch`.
"""
