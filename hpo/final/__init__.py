"""The final training of a pinned config, the one test on the test split, and the replay of a trial.

The package `after` works on a finished model. Nothing here searches.
"""
