"""What a study file says.

Here live the file's grammar and search space, and the meaning of each section. Options are read off signatures here, and the
user's own code is imported here. The words for metrics, objectives, failures, durations and seeds are here too. Nothing here
opens a storage or imports torch. How names in the file become PyTorch objects is in `hpo.train.build`. How a file becomes a
study is in `hpo.study`.
"""
