"""How a stage of the backbone is executed."""
