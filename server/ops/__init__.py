"""Whether the server lives, is ready, and what it counts: routes for operators."""
