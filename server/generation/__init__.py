"""What the generation endpoints share: request fields, sampling, driving an engine, log-probabilities, usage."""
