"""`ee-exits`: the operator's switch for the exits of a model."""
