"""Export with a text: the weights that calibration chose, what they cost, and errors that leave nothing behind."""

import dataclasses

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import portlm  # noqa: E402
from portlm.artifact import check_files, read_manifest  # noqa: E402
from portlm.commands.export import command  # noqa: E402
from portlm.compile.calibrate import calibrated, read  # noqa: E402
from portlm.compile.quantize import Scheme, dequantize  # noqa: E402
from portlm.compile.quantized_module import dequantized  # noqa: E402
from portlm.errors import FormatError, UsageError  # noqa: E402
from portlm.flows.export import export_checkpoint  # noqa: E402
from portlm.flows.quality import quality  # noqa: E402
from portlm.models import build, save_model  # noqa: E402
from portlm.models.gpt2 import GPT2Config  # noqa: E402
from portlm.runtimes.eager import TorchEngine  # noqa: E402
from portlm.tokenizer import byte_tokenizer  # noqa: E402

INT4 = Scheme(4, 32)


def tiny():
    torch.manual_seed(0)
    model = build(GPT2Config(vocab_size=256, context_length=32, n_layer=1, n_head=2, width=64)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated") / "checkpoint"
    save_model(folder, tiny(), byte_tokenizer())
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrated") / "text.txt"
    rng = np.random.default_rng(0)
    path.write_bytes(np.minimum(32 + rng.zipf(1.4, 2000), 126).astype(np.uint8).tobytes())
    return path


@pytest.fixture(scope="module")
def artifact(checkpoint, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibrated") / "model"
    return export_checkpoint(checkpoint, out, quantize="int4", group=32, calibrate=text)


def expected(text):
    model = tiny()
    return calibrated(model, model.roles(), read(text, byte_tokenizer(), 256), 32, INT4)


def test_the_weights_are_those_that_calibration_chose(artifact, text):
    model = tiny()
    with dequantized(model, artifact, read_manifest(artifact)):
        for name, numbers in expected(text).numbers.items():
            assert np.array_equal(model.get_parameter(name).detach().numpy(), dequantize(numbers, INT4)), name


def test_the_manifest_says_how_and_what_it_costs_on_text_that_was_not_seen(artifact, text):
    said = check_files(artifact).quantization
    assert (said.bits, said.group, said.symmetric, said.method) == (4, 32, True, "GPTQ")
    model, other, numbers = tiny(), tiny(), expected(text)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name in numbers.numbers:
                p.copy_(torch.from_numpy(dequantize(numbers.numbers[name], INT4)))
    raw = text.read_bytes()
    found = quality(*(TorchEngine.of(m, "cpu") for m in (model, other)), list(raw[1800:]), before=raw[1799])
    assert found.kl > 0
    assert dataclasses.astuple(found) == (
        said.cost.tokens, said.cost.perplexity_float32, said.cost.perplexity, said.cost.kl, said.cost.top1,
    )  # fmt: skip
    assert (said.cost.tokens, said.cost.text) == (200, "the end of text.txt, which was not calibrated with")


def test_the_same_checkpoint_and_text_give_the_same_bytes(artifact, checkpoint, text, tmp_path):
    again = export_checkpoint(checkpoint, tmp_path / "model", quantize="int4", group=32, calibrate=text)
    assert read_manifest(again).files == read_manifest(artifact).files


def test_the_command_takes_a_text(artifact, checkpoint, text, tmp_path):
    arguments = [str(checkpoint), str(tmp_path / "model"), "--quantize", "int4", "--group", "32"]
    result = CliRunner().invoke(command, [*arguments, "--calibrate", str(text)])
    assert result.exit_code == 0, result.output
    assert read_manifest(tmp_path / "model").quantization == read_manifest(artifact).quantization


def test_a_module_in_memory_is_calibrated_with_its_tokenizer(artifact, text, tmp_path):
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    options = {"quantize": "int4", "group": 32, "calibrate": text}
    made = portlm.export(model, tmp_path / "model", tokenizer=byte_tokenizer(), answer=False, **options)
    assert read_manifest(made).quantization == read_manifest(artifact).quantization
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_module_of_plain_pytorch_is_calibrated_and_gets_no_statement(text, tmp_path):
    from torch import nn

    class Plain(nn.Module):
        context_length = 32

        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(256, 64), nn.Embedding(32, 64)
            self.norm, self.qkv, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)
            self.head = nn.Linear(64, 256, bias=False)

        def forward(self, ids):
            x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
            q, k, v = (
                y.unflatten(-1, (2, 32)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, dim=-1)
            )
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.head(x + self.out(y.transpose(1, 2).flatten(2)))

    torch.manual_seed(0)
    options = {"quantize": "int4", "group": 32, "tokenizer": byte_tokenizer()}
    plain, other = (
        portlm.export(Plain().eval(), tmp_path / name, calibrate=path, **options)
        for name, path in (("plain", None), ("other", text))
    )
    said = read_manifest(other).quantization
    assert (said.method, said.cost) == ("GPTQ", None)
    assert read_manifest(plain).files != read_manifest(other).files


@pytest.mark.parametrize(
    ("options", "raw", "error", "words"),
    [
        ({}, b"a text", UsageError, "calibrate says by which text to quantize: say int8 or int4 as well"),
        ({"quantize": "int8", "group": 32}, None, FormatError, r"text\.txt"),
        ({"quantize": "int8", "group": 32}, b"", FormatError, "is empty"),
        ({"quantize": "int8", "group": 32}, b"too short " * 10, UsageError, r"leaves 64 tokens to calibrate with"),
        ({"quantize": "int8", "group": 32}, b"\xff\xfe" * 10, FormatError, "not UTF-8"),
    ],
    ids=["no scheme", "missing", "empty", "short", "not text"],
)  # fmt: skip
def test_a_text_that_cannot_be_used_leaves_nothing_behind(checkpoint, tmp_path, options, raw, error, words):
    if raw is not None:
        (tmp_path / "text.txt").write_bytes(raw)
    with pytest.raises(error, match=words):
        export_checkpoint(checkpoint, tmp_path / "model", calibrate=tmp_path / "text.txt", **options)
    assert [path.name for path in tmp_path.iterdir() if path.name != "text.txt"] == []


def test_a_checkpoint_without_a_tokenizer_reads_no_text(text, tmp_path):
    save_model(tmp_path / "checkpoint", tiny())
    with pytest.raises(UsageError, match="has no tokenizer of portlm's"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "m", quantize="int4", group=32, calibrate=text)


def test_the_command_refuses_a_text_without_a_scheme(checkpoint, text, tmp_path):
    result = CliRunner().invoke(command, [str(checkpoint), str(tmp_path / "model"), "--calibrate", str(text)])
    assert isinstance(result.exception, UsageError)
    assert "calibrate says by which text to quantize: say int8 or int4 as well" in str(result.exception)
