"""What the comparisons with transformers share."""

import warnings

import pytest


@pytest.fixture(scope="module")
def transformers():
    """The package, imported when the first test of a file needs it: that takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages deprecate is not ours to fix
        package = pytest.importorskip("transformers", reason="transformers is missing: pip install portlm[hf]")
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()
    return package
