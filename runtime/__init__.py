"""Makes containers: the agent, its builders, and what the user and the administrator type."""
