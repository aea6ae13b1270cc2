"""Archives tried out in processes of their own: what the original answers, and whether the new one answers the same."""
