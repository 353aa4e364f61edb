"""A small tokenizer for the preview."""

from data_fixtures import make_tokenizer, texts, tokenizer, tokenizer_dir

__all__ = ["make_tokenizer", "texts", "tokenizer", "tokenizer_dir"]
