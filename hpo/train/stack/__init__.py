"""K runs trained as one model: stacked layers, flat parameters in rows, optimizers on rows.

The training of a single run is in `hpo.train`. `hpo.train.build` chooses the executor of a study.
"""
