"""The parts of an exit, head and policy; the plan that names both; and the operator's switch."""
