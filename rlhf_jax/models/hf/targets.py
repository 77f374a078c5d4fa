"""Which modules of a model a PEFT adapter is of, by its adapter_config.json."""

from __future__ import annotations

import regex

from rlhf_jax.errors import UserError, shown
from rlhf_jax.models.hf.family import ConfigJson

_TIED = ("embed_tokens", "lm_head")
"""The names by which PEFT knows an embedding and a head that is tied to it."""


def matched(pattern: str, module: str, key: str) -> regex.Match[str] | None:
    """The match of a regular expression, of the value of `key`, with the whole name of a module.

    Raises:
        UserError: it is none, or takes far longer than such a name is worth.
    """
    try:
        return regex.fullmatch(pattern, module, timeout=1.0)
    except (regex.error, TimeoutError) as error:
        why = "finds no end" if isinstance(error, TimeoutError) else str(error)
        raise UserError(f"{key} makes the regular expression {shown(pattern)}, which {why}; correct it") from error


def by_weight(raw: ConfigJson, module: str) -> bool:
    """Whether target_parameters names a module's weight: PEFT adds the pair to it as it lies, whatever the layer."""
    return any(f".{module}.weight".endswith(f".{name}") for name in raw.get("target_parameters") or ())


def targeted(raw: ConfigJson, module: str) -> bool:
    """Whether PEFT reads the pair of a module: its `check_target_module_exists` (0.21), of modules that have one.

    A text is a regular expression of whole names, a list holds their ends; other keys take some of these away. PEFT
    always writes target_modules; without them every pair is read.
    """

    def named(key: str) -> bool:
        names = raw.get(key) or ()
        if isinstance(names, str):
            return matched(names, module, key) is not None
        return any(f".{module}".endswith(f".{name}") for name in names)

    if by_weight(raw, module):
        return True
    saved = (rf"(.*\.)?{name}(\..*)?" for name in raw.get("modules_to_save") or ())
    if named("exclude_modules") or any(matched(name, module, "modules_to_save") for name in saved):
        return False
    if module.rpartition(".")[2] in _TIED and kept_tied(raw, "target_modules"):
        return True  # the head's, which is the embedding's, is not among the targets
    targets, layers = raw.get("target_modules"), raw.get("layers_to_transform")
    found = targets is None or str(targets).lower() == "all-linear" or named("target_modules")
    if not found or not isinstance(targets, list) or layers is None or layers == []:
        return found
    patterns = raw.get("layers_pattern") or ()
    before = [rf"(?:|.*?\.){pattern}" for pattern in ([patterns] if isinstance(patterns, str) else patterns)]
    tried = (matched(rf"{start}\.(\d+)\..*", module, "layers_pattern") for start in before or [r".*?\.[^.]*"])
    layer = next((match for match in tried if match), None)
    return layer is not None and int(layer[1]) in (layers if isinstance(layers, list) else [layers])


def kept_tied(raw: ConfigJson, key: str) -> bool:
    """Whether what the modules of `key` give to one of a tied pair is of both in PEFT (0.21).

    It takes ensure_weight_tying to be of modules_to_save where these name one of them as Llama does, else of
    target_modules where those do; an embedding of another name, as GPT-2's, is untied all the same.
    """

    def names_one(key: str) -> bool:
        names = raw.get(key) or ()
        if isinstance(names, str):
            return any(matched(names, end, key) for end in _TIED)
        return any(name.rpartition(".")[2] in _TIED for name in names)

    first = next((key for key in ("modules_to_save", "target_modules") if names_one(key)), None)
    return bool(raw.get("ensure_weight_tying")) and key == first
