"""Turns recorded traffic into exits: exit heads, temperatures, confidence thresholds, a subset and a certificate."""
