"""Ways to write a decoder that the tutorial's and transformers' do not use, exported and run as they are."""

import warnings

import pytest

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import portlm  # noqa: E402

ERROR = 1e-4  # of a logit, as everywhere between engines
CONTEXT, WIDTH, HEADS = 24, 32, 4


class Block(nn.Module):
    def __init__(self, turn):
        super().__init__()
        self.turn, self.norm = turn, nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x):
        q, k, v = (
            part(self.norm(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
        x = x + y.transpose(1, 2).flatten(2)
        return x + self.mlp(x)


class Decoder(nn.Module):
    context_length = CONTEXT

    def __init__(self, blocks):
        super().__init__()
        self.tokens, self.blocks = nn.Embedding(61, WIDTH), nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 61)

    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def turn_pairs(x):
    """Rotary positions over neighbours, as the first paper has them: every other element."""
    places = torch.arange(x.shape[2])[:, None] * 1e4 ** (-torch.arange(0, x.shape[3], 2) / x.shape[3])
    cos, sin = places.cos(), places.sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def neighbours_turned():
    return Decoder([Block(turn_pairs), Block(turn_pairs)])


def one_block_twice():
    block = Block(lambda x: x)
    return Decoder([block, block])


def a_part_in_training():
    model = Decoder([Block(lambda x: x)]).eval()
    model.blocks[0].mlp.train()
    return model


class Layer(nn.Module):
    """nn.MultiheadAttention, which joins the batch and the heads, and reads and writes time before batch."""

    def __init__(self, batch_first, need_weights):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attend = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=batch_first)
        self.batch_first, self.need_weights = batch_first, need_weights

    def forward(self, x):
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y = self.norm(x)
        y = y if self.batch_first else y.transpose(0, 1)
        y, _ = self.attend(y, y, y, attn_mask=hidden, need_weights=self.need_weights)
        return x + (y if self.batch_first else y.transpose(0, 1))


def multihead_attention():
    return Decoder([Layer(True, False), Layer(True, True), Layer(False, False), Layer(False, True)])


class Encoder(nn.Module):
    """PyTorch's own stack; it would look whether the mask's values are causal."""

    def __init__(self, **settings):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True, **settings)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.layers(x, mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]))


def transformer_encoder():
    return Decoder([Encoder(), Encoder(norm_first=True, activation="gelu")])


MODELS = {
    f.__name__: f
    for f in (
        neighbours_turned,
        one_block_twice,
        a_part_in_training,
        multihead_attention,
        transformer_encoder,
    )
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request, foreign, tmp_path_factory):
    model = MODELS[request.param]()
    modes = [part.training for part in model.modules()]
    foreign.randomised(model)  # which puts it in eval mode
    for part, training in zip(model.modules(), modes, strict=True):
        part.training = training
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that it has no cache
        folder = portlm.export(model, tmp_path_factory.mktemp("spelled") / request.param)
    assert [part.training for part in model.modules()] == modes
    return model.eval(), folder


@pytest.mark.parametrize("profile", ["portable", "fused"])
@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_scores_are_those_of_the_module(engine, profile, exported):
    model, folder = exported
    ids = torch.randint(0, 61, (1, 17), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(ids).log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    with portlm.load(folder, engine=engine, device="cpu", profile=profile) as session:
        found = torch.tensor(session.score([ids[0].tolist()])[0].logprobs)
    assert (found - expected).abs().max() <= ERROR
