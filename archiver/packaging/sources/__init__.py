"""Where a backbone and the user's files come from: a .mar, a factory with weights, or an exported program."""
