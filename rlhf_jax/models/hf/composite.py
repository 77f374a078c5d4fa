"""Models of several parts, text beside images or sound: their language model is read as a model of its own."""

from __future__ import annotations

import re

from rlhf_jax.models.hf.family import ConfigJson
from rlhf_jax.models.hf.table import FAMILIES

_OF_ALL = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config")
"""Keys that stand above those of text_config, if they are there."""
BESIDE = re.compile(r"^(?:model\.)?(?:visual|vision_\w+|audio_\w+|embed_vision|embed_audio|multi_modal_projector)\.")
"""Names of the tensors of images and sound."""


def text_part(raw: ConfigJson) -> ConfigJson:
    """config.json of the language model of a model of several parts; that of any other model as it is."""
    text = raw.get("text_config")
    family = next((one for one in FAMILIES.values() if one.whole == raw.get("model_type")), None)
    if family is None or not isinstance(text, dict) or text.get("model_type", family.model_type) != family.model_type:
        return raw
    text = {"architectures": raw.get("architectures"), "model_type": family.model_type, **text}
    if text["architectures"] == [family.causal.replace("ForCausalLM", "ForConditionalGeneration")]:
        text["architectures"] = [family.causal]
    return text | {key: raw[key] for key in _OF_ALL if raw.get(key) is not None}


def text_name(name: str) -> str:
    """The name that a tensor of a language model has in a model of its own."""
    name = name.removeprefix("language_model.")
    return "model." + name.removeprefix("model.language_model.") if name.startswith("model.language_model.") else name
