"""An engine that answers as a script says, and sessions on engines that need no model."""

import numpy as np

from portlm.engine import Placement
from portlm.runtimes.base import ArrayEngine
from portlm.runtimes.null import DECODER, NullEngine
from portlm.runtimes.session import Session
from portlm.tokenizer import byte_tokenizer

EOS = 256
BYTES = byte_tokenizer(eos="<|endoftext|>")


class Scripted(ArrayEngine):
    """Answers each prompt with the tokens that a script has for it, whatever stands to its left or beside it.

    It knows a row only by the tokens that the mask shows, so a wrong mask, position or order gives another answer.
    """

    name, device, profile, precision = "scripted", "cpu", "native", "fp32"

    def __init__(self, script):
        super().__init__({"decoder": DECODER}, 257, 64)
        self.script = {
            tuple(p.encode()): list(a.encode()) if isinstance(a, str) else a for p, a in script.items()
        }
        self.steps = []
        self.closed = 0

    def _call(self, role, inputs, tensors):
        input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self.steps.append(input_ids.shape)
        ids = np.concatenate([tensors["past_ids"], input_ids], axis=1)
        assert mask.shape == ids.shape
        logits = np.zeros((*input_ids.shape, self.vocab_size), np.float32)
        past = ids.shape[1] - input_ids.shape[1]
        for b in range(len(ids)):
            for t in range(input_ids.shape[1]):
                seen = np.flatnonzero(mask[b, : past + t + 1])
                if not mask[b, past + t]:
                    continue
                assert inputs["position_ids"][b, t] == len(seen) - 1
                logits[b, t, self.next(tuple(ids[b, seen].tolist()))] = 9
        return {"logits": logits[:, inputs["logits_to_keep"]]}, {"past_ids": ids}

    def next(self, seen):
        for prompt, answer in self.script.items():
            if (
                seen[: len(prompt)] == prompt
                and list(seen[len(prompt) :]) == answer[: len(seen) - len(prompt)]
            ):
                rest = answer[len(seen) - len(prompt) :]
                return rest[0] if rest else EOS
        return 0

    def placement(self):
        return Placement({"cpu": 1})

    def close(self):
        self.closed += 1


def null(context=64, tokenizer=None):
    return Session(NullEngine(257, context), tokenizer or BYTES)


SCRIPT = {"a": "B", "hello": ", world", "xy": "", "q" * 20: "r" * 30, "hel": "icopter"}
