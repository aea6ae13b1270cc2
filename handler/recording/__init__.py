"""The record format, its writer, and how long records are kept."""
