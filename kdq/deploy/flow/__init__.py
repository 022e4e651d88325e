"""The flow of codes between layers: a traced model without calls, its grids, and its run."""
