"""Three models that nothing was built for, to show that no mechanism knows one kind of model.

A recurrent decoder whose state is replaced, an encoder with a decoder that looks at what it wrote, and a classifier
without any state. B rows, T new tokens, P slots in the cache, S source tokens, C width, V vocabulary.
"""

from types import SimpleNamespace

import pytest
from engine_cases import TARGETS

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import torch
from torch import nn

from portlm.models.layers import Embedding, Linear
from portlm.models.roles import Role
from portlm.ops.cached_attention import cached_attention
from portlm.ops.embedding import embedding
from portlm.roles import StateSpec, TensorSpec

V, CONTEXT, C, H = 61, 48, 24, 3
IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
POSITIONS = TensorSpec("position_ids", "int64", ("batch", "sequence"))
KEPT = TensorSpec("logits_to_keep", "int64", ("kept",))


class Stranger(nn.Module):
    """What the exporter asks of any module: how many ids it takes, and how many positions."""

    config = SimpleNamespace(vocab_size=V, context_length=CONTEXT)

    def randomise(self):
        """Weights so large that logits reach 3 and more."""
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=generator))
        return self.eval()


class Recurrent(Stranger):
    """The state is a running sum of what the tokens wrote; each token reads the sum so far."""

    def __init__(self):
        super().__init__()
        self.wte, self.inner, self.head = Embedding(V, C), Linear(C, C, bias=True), Linear(C, V, bias=False)
        self.register_buffer(
            "numbers", torch.arange(float(CONTEXT))[:, None]
        )  # integers become floats by look-up
        self.register_buffer("flags", torch.tensor([[0.0], [1.0]]))

    def step(self, ids, mask, positions, kept, total):
        """Logits (B, kept, V), and the state (B, C) after the last token; a masked token adds nothing."""
        place = embedding(positions, self.numbers)  # (B, T, 1)
        # 1 where token s is not behind token t, without a comparison, whose result would be a boolean.
        seen = torch.relu(torch.relu(place.transpose(1, 2) - place) * -1.0 + 1.0)  # (B, T, T)
        real = embedding(mask, self.flags)  # (B, T, 1)
        written = self.wte(ids) * real  # (B, T, C)
        sums = torch.matmul(seen, written) + total.unsqueeze(1)
        final = torch.matmul(real.transpose(1, 2), written).squeeze(1) + total
        hidden = self.inner(sums.index_select(1, kept))
        return self.head(hidden * torch.sigmoid(hidden)), final

    def roles(self):
        """One role, like any decoder's but for its state."""
        mask = TensorSpec("attention_mask", "int64", ("batch", "sequence"))
        outputs = (TensorSpec("logits", "float32", ("batch", "kept", V)),)
        state = (StateSpec("total", "new_total", "float32", ("batch", C), "zeros", "replace"),)
        return {"decoder": Role(self.step, (IDS, mask, POSITIONS, KEPT), outputs, state)}


class EncoderDecoder(Stranger):
    """One layer each: the decoder looks at its own past through a cache, and at the encoder's memory."""

    def __init__(self):
        super().__init__()
        self.source, self.target = Embedding(V, C), Embedding(V, C)
        self.places = Embedding(CONTEXT, C)
        self.mix, self.write = Linear(C, C, bias=True), Linear(C, C, bias=False)
        self.qkv, self.ask, self.out = (
            Linear(C, 3 * C, bias=True),
            Linear(C, C, bias=False),
            Linear(C, C, bias=True),
        )
        self.head = Linear(C, V, bias=False)
        self.register_buffer("hidden", torch.tensor([[-1e9], [0.0]]))

    def attend(self, queries, memory, mask):
        """Look from queries (B, T, C) at memory (B, S, C), where the mask (B, S) is 1."""
        bias = embedding(mask, self.hidden).transpose(1, 2)  # (B, 1, S)
        scores = torch.matmul(queries, memory.transpose(1, 2)) * C**-0.5 + bias
        return torch.matmul(torch.softmax(scores, -1), memory)

    def encode(self, ids, mask):
        """Memory (B, S, C)."""
        x = self.source(ids)
        return (self.write(torch.relu(self.mix(x) + self.attend(x, x, mask))),)

    def decode(self, ids, mask, positions, kept, memory, memory_mask, past_key, past_value):
        """Logits (B, kept, V), and the decoder's own cache, grown."""
        x = self.target(ids) + self.places(positions)
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, H, C // H).unbind(2)
        y, key, value = cached_attention(q, k, v, past_key, past_value, mask)
        x = x + self.out(y.reshape(B, T, C))
        x = x + self.attend(self.ask(x), memory, memory_mask)
        return self.head(x.index_select(1, kept)), key, value

    def roles(self):
        """An encoder without state; a decoder that is given what the encoder wrote."""
        source = ("batch", "source")
        encoder = Role(
            self.encode,
            (TensorSpec("input_ids", "int64", source), TensorSpec("attention_mask", "int64", source)),
            (TensorSpec("encoder_hidden_states", "float32", (*source, C)),),
        )
        mask = TensorSpec("attention_mask", "int64", ("batch", "past + sequence"))
        cache = ("batch", H, "past", C // H)
        decoder = Role(
            self.decode,
            (IDS, mask, POSITIONS, KEPT),
            (TensorSpec("logits", "float32", ("batch", "kept", V)),),
            (
                StateSpec("encoder_hidden_states", "", "float32", (*source, C), "given", "constant"),
                StateSpec("encoder_attention_mask", "", "int64", source, "given", "constant"),
                StateSpec("past.key", "present.key", "float32", cache, "empty", "append"),
                StateSpec("past.value", "present.value", "float32", cache, "empty", "append"),
            ),
        )
        return {"encoder": encoder, "decoder": decoder}


class Classifier(Stranger):
    """Weighs the tokens of a text, and says which of three topics their sum is about."""

    def __init__(self):
        super().__init__()
        self.wte, self.weigh, self.head = Embedding(V, C), Linear(C, 1, bias=False), Linear(C, 3, bias=True)
        self.register_buffer("hidden", torch.tensor([[-1e9], [0.0]]))

    def classify(self, ids, mask):
        """Logits (B, 3)."""
        x = self.wte(ids)
        weights = torch.softmax(
            (self.weigh(x) + embedding(mask, self.hidden)).transpose(1, 2), -1
        )  # (B, 1, T)
        return (self.head(torch.matmul(weights, x)).squeeze(1),)

    def roles(self):
        """One head, without state."""
        mask = TensorSpec("attention_mask", "int64", ("batch", "sequence"))
        outputs = (TensorSpec("logits", "float32", ("batch", 3)),)
        return {"head:topic": Role(self.classify, (IDS, mask), outputs)}


class Weightless(Classifier):
    """The classifier, and a head without a weight, whose file of weights is empty."""

    def odds(self, logits):
        """Shares (B, 3) of logits (B, 3)."""
        return (torch.softmax(logits + logits, -1),)

    def roles(self):
        """Two heads, without state."""
        three = ("batch", 3)
        odds = Role(
            self.odds, (TensorSpec("logits", "float32", three),), (TensorSpec("odds", "float32", three),)
        )
        return super().roles() | {"head:odds": odds}


MODELS = {
    "recurrent": Recurrent,
    "encoder-decoder": EncoderDecoder,
    "classifier": Classifier,
    "weightless": Weightless,
}


@pytest.fixture(scope="session")
def strangers():
    """The models by name."""
    return {name: model().randomise() for name, model in MODELS.items()}


@pytest.fixture(scope="session")
def stranger_artifact(strangers, tmp_path_factory):
    """Function: name -> the artifact of that model, made once."""
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.export import export_module

    root = tmp_path_factory.mktemp("strangers")

    def artifact(name):
        if not (root / name).exists():
            export_module(strangers[name], root / name)
        return root / name

    return artifact


@pytest.fixture(scope="session")
def open_stranger(strangers, stranger_artifact):
    """Function (name, engine, device, profile) -> an engine with that model, or a skip that says what is missing."""
    from portlm.errors import EngineUnavailableError
    from portlm.flows.load import load

    opened = {}

    def open_one(name, engine, device, profile):
        key = (name, engine, device, profile)
        if key not in opened:
            if profile == "native":  # the module itself, which all others must match
                from portlm.runtimes.eager import TorchEngine

                opened[key] = TorchEngine.of(strangers[name], device)
            else:
                try:
                    opened[key] = load(stranger_artifact(name), engine, device, profile).engine
                except EngineUnavailableError as error:
                    pytest.skip(str(error))
        return opened[key]

    yield open_one
    for engine in opened.values():
        engine.close()


@pytest.fixture(params=[t for t in TARGETS if t[0] != "packed"], ids=":".join)
def target(request):
    """Engine, device and profile."""
    return request.param
