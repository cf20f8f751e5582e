"""Reports of a sweep: rows in; statistics, tables, figures and pages out.

`statistics` has intervals and Pareto fronts, `series` the data behind each figure, `labels` what things are
called. `drawing` has the shared parts of a figure and the one function that saves it. `page` writes the page
of a run folder. Nothing here trains a model.
"""
