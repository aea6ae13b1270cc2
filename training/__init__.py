"""Turns what the handler recorded into exits: heads, temperatures, thresholds, a subset, a certificate."""
