"""What the comparisons with transformers share."""

import warnings
from dataclasses import replace

import pytest
import torch

from portlm.models import DECODERS, build

# Of every family, and those whose head is their embedding.
TINY = {name: family.config_class().tiny() for name, family in DECODERS.items() if family.foreign}
TINY["llama-tied"] = replace(TINY["llama"], n_layer=1, n_head=2, width=8, hidden=12, tie_embeddings=True)
TINY["gpt_neox-tied"] = replace(TINY["gpt_neox"], n_layer=1, tie_embeddings=True)


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small gain nothing from a second thread, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def transformers():
    """The package, imported when the first test of a file needs it: that takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages deprecate is not ours to fix
        package = pytest.importorskip(
            "transformers", reason="transformers is missing: pip install portlm[hf]"
        )
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()
    return package


# One for each way in which tensors lie in foreign files: turned, as they are, tied, several that are one here.
FORMS = ("gpt2", "llama", "gpt_neox-tied", "mixtral")


def _random(name):
    """A tiny model whose every parameter matters to the result."""
    torch.manual_seed(0)
    model = build(TINY[name]).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(params=TINY)
def model(request):
    """A tiny model of each family."""
    return _random(request.param)


@pytest.fixture(params=FORMS)
def sample(request):
    """A tiny model of each form, for what is about files and knows no family."""
    return _random(request.param)


@pytest.fixture
def gpt2():
    """A tiny GPT-2."""
    torch.manual_seed(0)
    return build(TINY["gpt2"]).eval()


@pytest.fixture
def llama():
    """A tiny LLaMA with grouped heads and an output matrix of its own."""
    torch.manual_seed(0)
    return build(TINY["llama"]).eval()
