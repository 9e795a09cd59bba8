"""The study file that `hpo init --from` writes: data looked at, and a model and a space that suit it.

`look.py` finds how a file or folder is read. `advice.py` chooses metric, model, training and budget. `page.py` writes
both down, each line with its reason. Nothing here trains.
"""
