#!/usr/bin/env bash
# transformers 5.23.0: a LLaVA whose vision_feature_layer is 0, what enters the first layer of its vision tower, cannot read a picture.
#
# 0 is a layer like -2 or 1, and LlavaConfig takes it; the forward pass then does not ask the tower for its layers, because 0 counts as
# "none wanted", and indexes None. What portlm does: it computes such a model, and gives what enters the first layer.
#
# Output seen (exit code 0 means that it still behaves so):
#   layer -1: logits
#   layer 1: logits
#   layer 0: TypeError: 'NoneType' object is not subscriptable
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 numpy==2.4.6
cat > "$work/read.py" <<'PYTHON'
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

vision = CLIPVisionConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2
)
text = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
)


def read(layer):
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, image_seq_length=4, vision_feature_layer=layer
    )
    model = LlavaForConditionalGeneration(config).eval()
    try:
        model(input_ids=torch.tensor([[3, 3, 3, 3, 5]]), pixel_values=torch.zeros(1, 3, 4, 4))
    except TypeError as error:
        return f"TypeError: {error}"
    return "logits"


said = {layer: read(layer) for layer in (-1, 1, 0)}
for layer, what in said.items():
    print(f"layer {layer}: {what}")
raise SystemExit(0 if said == {-1: "logits", 1: "logits", 0: "TypeError: 'NoneType' object is not subscriptable"} else 1)
PYTHON
"$work/venv/bin/python" "$work/read.py"
