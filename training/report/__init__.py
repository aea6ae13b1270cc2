"""Reports on a run and the evaluation of a run, for readers and machines."""
