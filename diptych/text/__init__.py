"""Tokens and words: tokenizer, chat template, detokenizer, stop strings, grammars, reasoning and tool calls."""
