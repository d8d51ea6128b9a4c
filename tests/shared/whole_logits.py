"""How tests read the logits of every token of a decoder, whatever the steps in which an engine is given them."""

import numpy as np

V = 257
CONTEXT = 48
TOLERANCE = 1e-4  # of fp32 logits of size 10, over engines that add in different orders


def random_ids(B, T, seed=0):
    return np.random.default_rng(seed).integers(0, V, (B, T))


def call(engine, ids, positions, mask, state):
    """Logits (B, T, V) of every token, and the next state."""
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    if any(item.name == "logits_to_keep" for item in engine.roles["decoder"].inputs):
        inputs["logits_to_keep"] = np.arange(ids.shape[1])
    outputs, state = engine.run("decoder", inputs, state)
    return outputs["logits"], state


def feed(engine, ids, cuts=(), lengths=None):
    """Logits (B, T, V) of ids (B, T), read in steps that end at each cut; row b has its last lengths[b] tokens."""
    B, T = ids.shape
    mask = np.ones((B, T), np.int64)
    for b, length in enumerate(lengths or ()):
        mask[b, : T - length] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    state, answers = engine.start("decoder", B), []
    for begin, end in zip((0, *cuts), (*cuts, T), strict=True):
        logits, state = call(engine, ids[:, begin:end], positions[:, begin:end], mask[:, :end], state)
        assert logits.dtype == np.float32
        assert logits.shape == (B, end - begin, V)
        answers.append(np.array(logits))
    return np.concatenate(answers, axis=1)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE, equal_nan=False)
