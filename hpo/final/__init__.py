"""From a pinned config to weights: the final training, the test split's one opening, replay.

`after` works on a finished model. Nothing here searches.
"""
