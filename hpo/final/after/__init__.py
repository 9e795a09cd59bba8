"""Work on a trained model: fold, prune, quantise, export, and estimate its uncertainty.

Each recipe makes a variant of the model, which is scored on the validation part. The test split is not opened.
"""
