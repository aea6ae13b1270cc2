"""Tries archives out in separate processes: notes the answers of the original, and checks those of the new archive."""
