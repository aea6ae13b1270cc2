"""What stands at an exit: the head, the policy that lets rows leave, and the plan that names both."""
