"""What decides a training run, and how YAML, command lines and jobs become it."""
