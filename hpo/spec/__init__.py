"""What a study file says.

This package holds the grammar, the search space and the meaning of each section. It reads options from function signatures
and imports the user's own code. It also defines metrics, objectives, failures, durations and seeds. It opens no storage and
imports no torch. `hpo.train.build` turns names into PyTorch objects. `hpo.study` turns a file into a study.
"""
