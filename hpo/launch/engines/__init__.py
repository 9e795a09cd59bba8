"""The engines that start workers on other machines. Each renders a plain script or manifest and hands it to the user's own tools.

No engine knows the database. What was launched is recorded by `hpo.launch.launching`.
"""
