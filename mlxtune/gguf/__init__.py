"""The GGUF file format, both ways: models in, models out.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
