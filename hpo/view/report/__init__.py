"""A study as one file to hand on: a page that opens anywhere without a network, a table, JSON, or a picture.

The numbers come from `hpo.analysis` and `hpo.study`. `reading.py` gathers them, `figures` draws them as plain dicts for
plotly, `page.py` lays them out. plotly-cartesian.min.js is the npm package plotly.js-cartesian-dist-min 4.1.1, unchanged;
its licence is plotly-LICENSE.txt.
"""
