"""The database: how we connect, retry and write, and Optuna's storage on Optuna's own tables.

Here live the engine, the SQL that both databases share, the tables, the rows of trials and the cache of finished ones.
Nothing here claims, renews or ends a trial: only the tables for that are here.
"""
