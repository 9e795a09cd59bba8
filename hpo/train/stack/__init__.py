"""K runs trained as one model: stacked layers, flat parameters in rows, optimizers on rows.

What a single run does is in `hpo.train`. Which executor a study gets is chosen in `hpo.train.build`.
"""
