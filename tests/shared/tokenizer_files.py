"""Small tokenizers of every kind, made with the tokenizers library, and texts to compare on."""

import base64
import json
import random
from functools import cache

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from portlm.data.python_topics import python_topics
from portlm.tokenizer_steps import SPLIT_PATTERNS

SAMPLE = python_topics()[:60_000] + " naïve café ÅNGSTRÖM 漢字かな交じり ½ ﬁne الخط Ελληνικά 😀👩‍👩‍👧 " * 20
GPT2, LLAMA3, QWEN2 = None, *SPLIT_PATTERNS
MARK = "\u2581"
# What the toy map replaces, as SentencePiece's nmt_nfkc does, and some that begin alike.
REPLACED = {
    "ﬁ": "fi",
    "½": "1/2",
    "Ａ": "A",
    "Å": "Å",
    "\u00a0": " ",
    "\t": " ",
    "\n": " ",
    "\u200b": "",
    "か\u3099": "が",
}


def charsmap(replaced=REPLACED):
    """Compile a character map to SentencePiece's form: a double-array trie, each node with a block of its own."""
    trie, texts = {}, b""
    for key, value in replaced.items():
        node = trie
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[0] = len(texts)
        texts += value.encode() + b"\0"
    units, todo = {}, [(0, trie, 0)]
    block = 0
    while todo:
        place, node, label = todo.pop()
        block += 256
        units[place] = (place ^ block) << 10 | (256 if 0 in node else 0) | label
        for byte, child in node.items():
            if byte == 0:
                units[block] = child | 1 << 31
            else:
                todo.append((block ^ byte, child, byte))
    array = np.zeros(block + 256, "<u4")
    for place, unit in units.items():
        array[place] = unit
    return base64.b64encode(np.uint32(array.nbytes).tobytes() + array.tobytes() + texts).decode()


def token(content, index, **flags):
    """An entry of added_tokens."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content} | plain | flags


def _trained(model, trainer, **parts):
    learner = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        if part is not None:
            setattr(learner, name, part)
    learner.train_from_iterator([SAMPLE], trainer)
    return json.loads(learner.to_str())


def _byte_level(regex, normalizer=None, added=()):
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)]
    if regex is not None:
        steps.insert(0, pre_tokenizers.Split(tokenizers.Regex(regex), "isolated"))
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    document = _trained(models.BPE(), trainer, normalizer=normalizer,
                        pre_tokenizer=pre_tokenizers.Sequence(steps), decoder=decoders.ByteLevel())  # fmt: skip
    size = len(document["model"]["vocab"])
    document["added_tokens"] = [token(t, size + i) if isinstance(t, str) else token(t[0], size + i, **t[1])
                                for i, t in enumerate(["<|endoftext|>", *added])]  # fmt: skip
    return document


def _roberta():
    document = _byte_level(
        None,
        added=[
            "<s>",
            "</s>",
            ("<mask>", {"lstrip": True}),
            ("<word>", {"special": False, "single_word": True}),
        ],
    )
    ids = {t["content"]: t["id"] for t in document["added_tokens"]}
    document["post_processor"] = {"type": "RobertaProcessing", "sep": ["</s>", ids["</s>"]], "cls": ["<s>", ids["<s>"]],
                                  "trim_offsets": True, "add_prefix_space": False}  # fmt: skip
    return document


def _template(begin, end, ids):
    def piece(name):
        return {"SpecialToken": {"id": name, "type_id": 0}}

    texts = [{"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB")]
    before, after = [piece(t) for t in begin], [piece(t) for t in end]
    used = {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (*begin, *end)}
    second = [*texts[1:], *({"SpecialToken": {"id": t, "type_id": 1}} for t in end)]
    return {"type": "TemplateProcessing", "single": [*before, texts[0], *after],
            "pair": [*before, texts[0], *after, *second], "special_tokens": used}  # fmt: skip


def _sentence_piece(legacy=True, size=700):
    """BPE with byte fallback, as LLaMA 2's: the vocabulary has the control tokens and the bytes first."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, special_tokens=names, limit_alphabet=90, max_token_length=12
    )
    spaces = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    document = _trained(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"), trainer, normalizer=spaces,
                        pre_tokenizer=pre_tokenizers.Split(MARK, "merged_with_next"))  # fmt: skip
    size = len(document["model"]["vocab"])
    document["added_tokens"] = [
        *(token(name, i) for i, name in enumerate(names[:3])),
        token("<|user|>", size, rstrip=True),
        token("[TOOL]", size + 1, special=False, normalized=True),
    ]
    document["pre_tokenizer"] = None
    if not legacy:
        document["normalizer"] = None
        document["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": MARK,
            "prepend_scheme": "first",
            "split": False,
        }
    document["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": MARK}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}  # fmt: skip
    document["post_processor"] = _template(["<s>"], [], {"<s>": 1})
    return document


def _gemma():
    document = _sentence_piece()
    document["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    document["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    document["decoder"]["decoders"].pop()
    return document


def _word_piece(lowercase=True):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=700, show_progress=False, special_tokens=names, limit_alphabet=120
    )
    document = _trained(
        models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100), trainer,
        normalizer=normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(cleanup=True),
    )  # fmt: skip
    document["added_tokens"][4]["lstrip"] = True
    document["post_processor"] = _template(["[CLS]"], ["[SEP]"], {"[CLS]": 2, "[SEP]": 3})
    return document


def _bert_processing():
    return _word_piece(lowercase=False) | {
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    }


def _unigram(byte_fallback=False):
    names = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=600, show_progress=False, special_tokens=names, unk_token="<unk>"
    )
    space = pre_tokenizers.Metaspace(MARK, prepend_scheme="always")
    document = _trained(models.Unigram(), trainer, pre_tokenizer=space, decoder=decoders.Metaspace())
    vocab = document["model"]["vocab"]
    if byte_fallback:
        vocab += [[f"<0x{byte:02X}>", 0.0] for byte in range(256)]
        document["model"]["byte_fallback"] = True
    size = len(vocab)
    vocab += [[f"<extra_id_{i}>", 0.0] for i in range(2)]
    document["added_tokens"] += [token(f"<extra_id_{i}>", size + i) for i in range(2)]
    document["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Precompiled", "precompiled_charsmap": charsmap()},
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": MARK}]}  # fmt: skip
    document["post_processor"] = _template([], ["</s>"], {"</s>": 1})
    return document


def _word_level():
    """The most frequent words, [UNK] for the others, between two control tokens."""
    trainer = trainers.WordLevelTrainer(
        vocab_size=500, show_progress=False, special_tokens=["[UNK]", "[CLS]", "[SEP]"]
    )
    document = _trained(
        models.WordLevel(unk_token="[UNK]"), trainer, pre_tokenizer=pre_tokenizers.Whitespace()
    )
    document["post_processor"] = _template(["[CLS]"], ["[SEP]"], {"[CLS]": 1, "[SEP]": 2})
    return document


def _gpt():
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, special_tokens=["<unk>"], end_of_word_suffix="</w>"
    )
    return _trained(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"), trainer,
                    normalizer=normalizers.BertNormalizer(lowercase=True), decoder=decoders.BPEDecoder(suffix="</w>"),
                    pre_tokenizer=pre_tokenizers.BertPreTokenizer())  # fmt: skip


_MAKERS = {
    "gpt2": lambda: _byte_level(GPT2),
    "llama 3": lambda: _byte_level(LLAMA3, added=["<|begin_of_text|>", "<|eot_id|>"]),
    "qwen 2": lambda: _byte_level(QWEN2, normalizers.NFC(), ["<|im_start|>", ("<tool>", {"special": False})]),
    "gpt-neox": lambda: _byte_level(GPT2, normalizers.NFC()),
    "roberta": _roberta,
    "llama 2": _sentence_piece,
    "llama 2, not legacy": lambda: _sentence_piece(legacy=False),
    "gemma": _gemma,
    "bert": _word_piece,
    "bert, cased": _bert_processing,
    "t5": _unigram,
    "t5 with bytes": lambda: _unigram(byte_fallback=True),
    "gpt": _gpt,
    "words": _word_level,
}
KINDS = list(_MAKERS)


@cache
def _document(kind):
    return json.dumps(_MAKERS[kind]())


def document(kind):
    """The tokenizer.json of a kind, parsed; the caller's own."""
    return json.loads(_document(kind))


_POOLS = [
    [chr(c) for c in range(0x20, 0x7F)],
    [*" \n\t\r  ", "  ", "\u00a0", "\u200b", "\u3000", "\x00", "\x07", "\x85", "\ufeff", "\ufffd"],
    [*"éèàüßÅÅøıİŁñ", "e\u0301", "\u0301", "か\u3099", "ﬁ", "½", "Ａ", "ǅ"],
    list("漢字かな交じり文書中文，。！？한국어 العربية עברית हिन्दी ไทย Ελληνικά Кириллица"),
    ["😀", "👩‍👩‍👧", "🇩🇪", "❤️", "𝒳", "\U0010ffff", "\ue000", "\ufdd0"],
    ["<s>", "</s>", "<unk>", "[MASK]", "[CLS]", " [MASK] ", "<mask>", "<|endoftext|>", "<|im_start|>", "<extra_id_0>",
     "<0x0A>", "<|user|>", "[TOOL]", "<tool>", "<word>", " <word> ", "</w>", "##", MARK, "Ġ", "<pad>"],
    ["don't", "I'm", "we'LL", " the", "The ", "1234567", " 42", "def f(x):\n    return x\n", "...", "?!", " n't"],
]  # fmt: skip


def texts(count, seed=0):
    """Mixed Unicode: short and long, of one script and of many, with the names of control tokens inside."""
    draw = random.Random(seed)
    words = SAMPLE.split(" ")
    for _ in range(count):
        pools = draw.sample(_POOLS, draw.randint(1, 3))
        parts = []
        for _ in range(draw.choice((0, 1, 3, 8, 20))):
            if draw.random() < 0.25:
                parts.append(" " + draw.choice(words))
            else:
                parts.append(draw.choice(draw.choice(pools)))
            if draw.random() < 0.02:  # any character at all, but for halves of pairs
                code = draw.randrange(0x110000)
                parts.append(chr(code) if not 0xD800 <= code < 0xE000 else "?")
        yield "".join(parts)
