"""One page of the results of one or several workdirs, with its tables and plots as files.

`read` takes what is in workdirs and says what it leaves out, `combine` keeps apart what must not
be compared, `specs` makes charts of it (Vega-Lite), `build` the page, and `write` the files.
"""
