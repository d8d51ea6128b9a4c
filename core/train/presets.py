"""Settings of pretraining runs by name, as data."""

from typing import Any

from portlm.errors import ConfigError

DEFAULT = "nanogpt-cpu"  # says nothing but the defaults

PRESETS: dict[str, dict[str, Any]] = {
    # A toy that trains in seconds: for tests, demonstrations and continuous integration.
    "tiny": {
        "steps": 200,
        "model": {"n_layer": 2, "n_head": 2, "width": 64, "context_length": 64},
        "evaluation": {"interval": 100},
        "checkpoint": {"interval": 100},
    },
    # nanoGPT, "I only have a macbook": config/train_shakespeare_char.py with its CPU overrides. The default of all.
    "nanogpt-cpu": {
        "model": {
            "family": "gpt2",
            "n_layer": 4,
            "n_head": 4,
            "width": 128,
            "context_length": 64,
            "dropout": 0.0,
        }
    },
    # nanoGPT's config/train_shakespeare_char.py as written, 10.7 million parameters.
    "nanogpt": {
        "steps": 5000,
        "model": {"n_layer": 6, "n_head": 6, "width": 384, "context_length": 256, "dropout": 0.2},
        "data": {"batch_size": 64},
    },
    # LLaMA's block at the size of nanogpt-cpu, with two query heads per key/value head.
    "llama-tiny": {"model": {"family": "llama", "n_head": 4, "n_kv_head": 2}},
    # word2vec.c's defaults (Mikolov et al. 2013), with AdaGrad in place of a step of gradient descent for every word.
    "word2vec": {
        "objective": "skipgram",
        "model": {"family": "word_vectors", "width": 100, "context_length": 64},
        "data": {"tokenizer": "word:5000", "batch_size": 12},
        "optimizer": {"name": "adagrad", "lr": 0.1, "weight_decay": 0.0, "clip": 0.0},
        "schedule": {"shape": "linear", "warmup": 0.0, "min_lr": 1e-5},
    },
    # GloVe (Pennington et al. 2014), at the width of word2vec above; a step is 768 pairs.
    "glove": {
        "objective": "glove",
        "model": {"family": "word_vectors", "width": 100, "context_length": 64},
        "data": {"tokenizer": "word:5000", "batch_size": 12},
        "optimizer": {"name": "adagrad", "lr": 0.05, "weight_decay": 0.0, "clip": 0.0},
        "schedule": {"shape": "linear", "warmup": 0.0, "min_lr": 0.05},
    },
    # GPT-2 small (Radford et al. 2019); the batch is for one accelerator, use data.accumulate for more.
    "gpt2": {
        "steps": 100_000,
        "model": {"n_layer": 12, "n_head": 12, "width": 768, "context_length": 1024},
        "data": {"batch_size": 8, "accumulate": 8},
        "optimizer": {"lr": 6e-4, "beta2": 0.95},
        "schedule": {"warmup": 2000, "min_lr": 6e-5},
        "evaluation": {"interval": 1000, "max_tokens": 1 << 20},
        "checkpoint": {"interval": 1000},
    },
}


def preset_settings(name: str) -> dict[str, Any]:
    """Return the settings tree of a named preset.

    Raises:
        ConfigError: No preset has this name; the message lists those that exist.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
