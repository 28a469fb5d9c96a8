"""Distributed training of language models for CTR prediction with Dynamic Target Isolation."""

__version__ = "0.1.0"
