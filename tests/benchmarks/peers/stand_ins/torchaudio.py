"""Stands in for torchaudio, which LLaMA-Factory imports for audio models and PyPI builds for another torch."""
