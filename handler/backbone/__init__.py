"""The user's classifier as a graph: exported, described, cut into stages."""
