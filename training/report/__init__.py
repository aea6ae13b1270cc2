"""What a run found, for readers and machines."""
