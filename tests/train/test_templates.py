"""A tokenizer with a template in training: the model reads text alone, and is later asked as it was taught."""

import json

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

from portlm.data.python_topics import python_topics
from portlm.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer
from portlm.train.config import DataSettings
from portlm.train.corpus import open_corpus


@pytest.mark.parametrize("prepared", [False, True], ids=["a text", "shards"])
def test_shards_and_checkpoints_have_no_template(tmp_path, prepared):
    document = json.loads(byte_tokenizer(END_OF_TEXT).to_json())
    begin, text = (
        {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    document["post_processor"] = {
        "type": "TemplateProcessing", "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [256], "tokens": [END_OF_TEXT]}},
    }  # fmt: skip
    given = tmp_path / "tokenizer.json"
    given.write_text(json.dumps(document))
    assert Tokenizer.load(given).encode("a") == [256, 97]
    (tmp_path / "text.txt").write_text(python_topics()[:5000])
    settings = DataSettings(texts=(str(tmp_path / "text.txt"),), tokenizer=str(given))
    if prepared:
        open_corpus(settings, tmp_path / "shards", fresh=True, note=str)
        settings = DataSettings(texts=(str(tmp_path / "shards"),), tokenizer=str(given))
    for fresh in (True, False):  # and resumed
        corpus = open_corpus(settings, tmp_path / "data", fresh=fresh, note=str)
        assert 256 not in corpus.train[: len(corpus.train)].tolist()
        corpus.tokenizer.save(tmp_path / "checkpoint")
        asked = Tokenizer.load(tmp_path / "checkpoint")
        assert (asked.encode("a"), asked.eos_id) == ([97], 256)
