"""The queries of `hpo.study`, one module for each kind of question. Nothing here writes or takes a lock.

No other module of `hpo.study` holds SQL.
"""
