"""What the finished trials of a study say: noise, confirmation, verdicts, health checks.

The statistics are pure functions of numbers. The rest reads a study with `hpo.study` and prints nothing: words and
pages are in `hpo.view`. The SQL is in `hpo.study.query`. Nothing here trains, and nothing here knows torch.
"""
