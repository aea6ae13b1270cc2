"""What a run led to and what it is worth, for readers and machines."""
