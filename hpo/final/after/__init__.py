"""What is done with a model after its training: quantify doubt, fold, prune, quantise, export.

Each step makes a variant that is scored on the validation part. The test part stays closed.
"""
