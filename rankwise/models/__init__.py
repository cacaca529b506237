"""Base models: where they lie, and loading them as transformers models and tokenizers."""

from rankwise.models.locate import local_path as local_path
