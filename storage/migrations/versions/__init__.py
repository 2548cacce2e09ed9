"""One file a migration step, in order of their numbers."""
