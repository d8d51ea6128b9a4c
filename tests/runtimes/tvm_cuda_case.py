"""Calls of a model, in a process of its own: python tvm_cuda_case.py ARTIFACT ENGINE DEVICE PROFILE OUT.npz."""

import os
import sys
from pathlib import Path

import numpy as np

from portlm.artifact import read_manifest
from portlm.engine import OpenRequest
from portlm.runtimes import engine_class


def inputs_of(spec, ids, past, lengths):
    """The inputs of a decoder for T tokens behind P slots, of rows that end together."""
    T = ids.shape[1]
    slots = np.arange(past + T)
    mask = (slots >= past + T - np.asarray(lengths)[:, None]).astype(np.int64)
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, past:]
    known = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "logits_to_keep": np.arange(T),
    }
    return {item.name: np.ascontiguousarray(known[item.name]) for item in spec.inputs}


def main(folder, engine, device, profile, out):
    manifest = read_manifest(folder)
    opened = engine_class(engine).open(OpenRequest(Path(folder), manifest, device, profile))
    spec, rng, found = opened.roles["decoder"], np.random.default_rng(0), {}
    log = os.environ.get("FAKE_CUDA_LOG")

    def run(name, state, ids, lengths):
        outputs, state = opened.run("decoder", inputs_of(spec, ids, state.past, lengths), state)
        found[name] = outputs["logits"]
        return state

    def ids(B, T):
        return rng.integers(0, opened.vocab_size, (B, T))

    def note(line):
        if log:
            with Path(log).open("a") as file:
                file.write(f"{line}\n")

    state = run("at once", opened.start("decoder", 3), ids(3, 5), [5, 2, 4])
    note("step")
    state = run("a step", state, ids(3, 1), [6, 3, 5])
    note("end of step")
    state = run("several tokens", state, ids(3, 2), [8, 5, 7])
    state = run("other rows", opened.reorder(state, [2, 0]), ids(2, 1), [8, 9])
    state = run("taken back", opened.crop(state, [4, 6]), ids(2, 1), [4, 7])  # one was padding
    other = run("another", opened.start("decoder", 1), ids(1, 3), [3])
    state = run("joined", opened.join([state, other]), ids(3, 1), [5, 8, 4])
    for i in range(5):
        note("later step")
        state = run(f"later {i}", state, ids(3, 1), [6 + i, 9 + i, 5 + i])
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
