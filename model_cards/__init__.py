"""Hub READMEs: of converted checkpoints, and the default one's template.

Installed as `modeling_lumina_mgpt.model_cards`.
"""

from collections.abc import Sequence
from pathlib import Path


def converted_card(
    name: str, source: str, family: str, licence: dict[str, str], tasks: Sequence[str] | None, published: str = ""
) -> str:
    """The card of a checkpoint that `lumina-mgpt convert` made.

    Args:
        name: title of the card.
        source: name of the folder, or repo, that it was converted from.
        family: with its paper.
        licence: `license` and the like, for the front matter.
        tasks: what it was trained for; None: not known.
        published: repo of the published checkpoint that `source` was taken for.
    """
    from_chameleon = licence.get("license_name", "").startswith("chameleon")
    research = " They derive from Chameleon, whose licence allows research only." if from_chameleon else ""
    taken = f" (taken for `{published}`)" if published not in ("", source) else ""
    template = (Path(__file__).parent / "converted.md").read_text()
    return template.format(
        name=name,
        source=source,
        taken=taken,
        family=family,
        licence="\n".join(f"{key}: {value}" for key, value in licence.items()),
        research=research,
        tasks=", ".join(tasks or ["not stated by the source"]),
    )
