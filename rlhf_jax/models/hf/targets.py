"""Which modules of a model a PEFT adapter is of, by its adapter_config.json."""

from __future__ import annotations

import regex

from rlhf_jax.errors import UserError, shown
from rlhf_jax.models.hf.family import ConfigJson


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

    saved = (rf"(.*\.)?{name}(\..*)?" for name in raw.get("modules_to_save") or ())
    if named("exclude_modules") or any(matched(name, module, "modules_to_save") for name in saved):
        return False
    targets, layers = raw.get("target_modules"), raw.get("layers_to_transform")
    found = targets is None or str(targets).lower() == "all-linear" or named("target_modules")
    if not found or not isinstance(targets, list) or layers is None or layers == []:
        return found
    patterns = raw.get("layers_pattern") or ()
    before = [rf"(?:|.*?\.){pattern}" for pattern in ([patterns] if isinstance(patterns, str) else patterns)]
    tried = (matched(rf"{start}\.(\d+)\..*", module, "layers_pattern") for start in before or [r".*?\.[^.]*"])
    layer = next((match for match in tried if match), None)
    return layer is not None and int(layer[1]) in (layers if isinstance(layers, list) else [layers])
