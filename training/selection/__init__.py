"""Temperatures, thresholds, the subset of exits, and the certificate."""
