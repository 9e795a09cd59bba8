"""The database: how we connect, retry and write, and Optuna's storage on Optuna's own tables.

Here live the engine, the SQL that both databases share, the tables, the rows of trials and the cache of finished ones.
The clocks, the watch over a SQLite file and its descriptors, and how a URL is shown without secrets are here too.
Nothing here claims, renews or ends a trial: only the tables for that are here.
"""
