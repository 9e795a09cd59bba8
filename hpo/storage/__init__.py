"""The database: how we connect, retry and write, and Optuna's storage on Optuna's own tables.

Here live the engine, the SQL that both databases share, the tables, the rows of studies and trials, and the cache of
finished trials. Every private name of Optuna that we use stands here, in `optuna_private`. The clocks, the watch over a
SQLite file and its descriptors, and the redaction of URLs are here too. Nothing here claims, renews or ends a trial:
only the tables for that are here.
"""
