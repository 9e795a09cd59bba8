"""What people see: the live view, the dashboard, printed pages.

Nothing here changes a study or computes a result. The numbers come from `hpo.study`.
What guards the dashboard from other sites is here too.
"""
