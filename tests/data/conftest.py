"""A small tokenizer and real text for all data tests."""

from data_fixtures import chat_dir, encode, make_data, make_tokenizer, texts, tokenizer, tokenizer_dir

__all__ = ["chat_dir", "encode", "make_data", "make_tokenizer", "texts", "tokenizer", "tokenizer_dir"]
