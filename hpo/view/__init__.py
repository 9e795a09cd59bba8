"""The live view, the dashboard, printed pages, reports, and runs in MLflow.

Nothing here changes a study or computes a result. The numbers come from `hpo.study` and `hpo.analysis`. This package also
protects the dashboard from other web sites.
"""
