"""The figures of a report as plain dicts for plotly, drawn from a study's columns. One module for each subject."""
