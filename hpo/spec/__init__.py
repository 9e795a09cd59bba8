"""What a study file says.

Here live the file's grammar and search space, the meaning of each section, options read off signatures, the import of the
user's own code, and the words for metrics, objectives, failures, durations and seeds. Nothing here opens a storage or imports
torch. How names in the file become PyTorch objects is in `hpo.train.build`. How a file becomes a study is in `hpo.study`.
"""
