"""Programs that peers' own interpreters run; they know nothing of Tuneloop."""
