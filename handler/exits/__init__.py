"""The parts of an exit (exit head and exit policy), the plan that names them, and the operator's switch."""
