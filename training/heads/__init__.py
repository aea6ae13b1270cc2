"""Exit heads: their search space, training and search."""
