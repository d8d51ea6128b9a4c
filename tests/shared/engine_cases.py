"""What the tests of engines ask all of them: which engines there are, and texts to write in many ways."""

TARGETS = [
    ("torch", "cpu", "native"),
    ("torch", "cpu", "portable"),
    ("torch", "cpu", "fused"),
    ("ort", "cpu", "portable"),
    ("ort", "cpu", "fused"),
    ("ort", "vulkan", "portable"),
    ("ort", "vulkan", "fused"),
    ("tvm", "cpu", "portable"),
    ("tvm", "cpu", "fused"),
    ("packed", "cpu", "fused"),
]
"""Engine, device and profile of every engine that needs no NVIDIA GPU."""

PROMPTS = ["The ", "", "a much longer prompt than the others", "12", "x"]
OPTIONS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 3},
    "filtered": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 4},
    "seeds": {"temperature": 1.5, "seed": [9, 8, 7, 6, 5]},
    "past the end": {"temperature": 2.0, "ignore_eos": True},
    "lengths": {"temperature": 1.0, "max_new_tokens": [1, 2, 9, 5, 12]},
    "stops": {"temperature": 1.0, "stop": ["e", "\x00"]},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "penalties sampled": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "temperature": 1.0},
}
"""How to write on from PROMPTS, by name: arguments of Session.generate."""
