"""Protection of paths that others could tamper with: private files, and names that come from elsewhere."""
