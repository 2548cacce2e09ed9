"""Training methods: what each learns from, and its loss."""
