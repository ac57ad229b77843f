"""The card of a full-precision model: what it says of the license."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

CARD = "README.md"

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def license_of(model: str) -> dict[str, str]:
    """What the card of a model says about its license; nothing if there is no card at hand.

    Args:
        model: a directory, or a hub name; of that, only what is in the local cache is looked at.
    """
    import yaml
    from huggingface_hub import try_to_load_from_cache

    card: Any = Path(model) / CARD
    if not Path(model).is_dir():
        card = try_to_load_from_cache(model, CARD) if HUB_NAME.fullmatch(model) else None
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return {}
    text = Path(card).read_text(encoding="utf-8-sig", errors="replace")
    found = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}  # somebody else's card, which need not be valid
    names = ("license", "license_name", "license_link")
    given = front if isinstance(front, dict) else {}
    return {name: given[name] for name in names if isinstance(given.get(name), str)}
