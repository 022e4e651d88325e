"""One page of the results of one or several workdirs, with its tables and plots as files.

`combine` keeps apart what must not be compared, `section` collects what is said of an experiment,
`specs` makes its charts (Vega-Lite), and `publish` writes the page and the files.
"""
