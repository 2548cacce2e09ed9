"""Base models and adapters as OpenAI's models: list, retrieve, delete, load, unload, pin."""
