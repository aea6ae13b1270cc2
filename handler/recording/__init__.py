"""The record format and its writer."""
