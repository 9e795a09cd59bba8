"""The database: how we connect, retry and write, and Optuna's storage on Optuna's own tables.

Here live the engine, the SQL that both databases share, the tables, the rows of trials and the cache of finished ones.
Nothing here knows a worker, a lease or a study file.
"""
