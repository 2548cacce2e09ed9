"""Fine-tuning jobs: the queue, what becomes of trainers and their results."""
