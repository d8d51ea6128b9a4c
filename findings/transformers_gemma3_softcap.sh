#!/usr/bin/env bash
# transformers 5.23.0: Gemma 3 takes attn_logit_softcapping in its configuration and never applies it, whatever computes attention.
#
# The published Gemma 3 models set it to null, so their answers are right. A model that was made or trained with a cap elsewhere is
# computed without it, silently; Gemma 2, which has the same key, applies it in eager mode. What portlm does: it refuses a gemma3_text
# whose attn_logit_softcapping is a number, and names the key.
#
# Output seen (exit code 0 means that it still behaves so): the largest difference of logits between no cap and one of 0.01
#   gemma2 eager: differs
#   gemma3 eager: 0.0
#   gemma3 sdpa:  0.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 numpy==2.4.6
cat > "$work/compare.py" <<'PYTHON'
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig


def logits(config_class, model_class, cap, attention):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, query_pre_attn_scalar=1,
        attn_logit_softcapping=cap, final_logit_softcapping=None, attn_implementation=attention,
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
        return model(torch.arange(20)[None]).logits


def difference(config_class, model_class, attention):
    without, capped = (logits(config_class, model_class, cap, attention) for cap in (None, 0.01))
    return (without - capped).abs().max().item()


older = difference(Gemma2Config, Gemma2ForCausalLM, "eager")
newer = [difference(Gemma3TextConfig, Gemma3ForCausalLM, attention) for attention in ("eager", "sdpa")]
print("gemma2 eager:", "differs" if older > 0.01 else older)
print("gemma3 eager:", newer[0])
print("gemma3 sdpa: ", newer[1])
raise SystemExit(0 if older > 0.01 and newer == [0.0, 0.0] else 1)
PYTHON
"$work/venv/bin/python" "$work/compare.py"
