"""What `import hpo` offers: a search and its study, and the lines of a user's own training loop.

Nothing heavy is imported before a function is called. No function ends the process.
"""
