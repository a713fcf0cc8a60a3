"""Recipes and a config for plans, which load no model."""

from __future__ import annotations

from mlxtune.recipe.load import parse_recipe

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}


def recipe_of(**sections):
    given = {"name": "p", "model": {"path": "none"}, "data": [{"path": "none"}]}
    for section, keys in sections.items():
        given[section] = given.get(section, {}) | keys if isinstance(keys, dict) else keys
    return parse_recipe(given, where="test")
