"""What stages and exits cost, in FLOPs or measured seconds."""
