"""The user's own training as a function of one trial: an objective, `train`, or a command.

A command's program runs as a child process. No study and no database are known here; what a worker does for a trial comes
from outside.
"""
