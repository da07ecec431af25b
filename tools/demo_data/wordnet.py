"""Reads Princeton WordNet's database files (Debian package wordnet-base, WordNet licence).

A line of data.noun or data.verb is one synset, a meaning with the words that carry it:

    00002137 03 n 02 abstraction 0 abstract_entity 0 010 @ 00001740 n 0000 ... | a general ...
    offset   |    |  word and sense, twice           |   pointers: kind, offset,    gloss
             |    number of words (hexadecimal)      |             part, which
             lexicographer file: the coarse class    number of pointers
"""

import re
from dataclasses import dataclass
from pathlib import Path

from demo_data.problem import Problem

DEFAULT_FOLDER = Path("/usr/share/wordnet")

# Lexicographer files by number, as listed in WordNet's lexnames(5WN).
LEXICOGRAPHER_FILES = (
    "adj.all", "adj.pert", "adv.all",
    "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute", "noun.body",
    "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food",
    "noun.group", "noun.location", "noun.motive", "noun.object", "noun.person",
    "noun.phenomenon", "noun.plant", "noun.possession", "noun.process", "noun.quantity",
    "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition",
    "verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion",
    "verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather",
    "adj.ppl",
)
HYPERNYMS = ("@", "@i")  # "is a" and, for names of single things, "is an instance of"


@dataclass(frozen=True)
class Synset:
    part: str  # "noun" or "verb"
    offset: str  # eight digits; with `part` it names the synset
    words: tuple  # spaces instead of underscores; the first is the most usual
    lexicographer_file: str  # such as "noun.food"
    hypernyms: tuple  # offsets, within the same part of speech
    gloss: str  # the definition, then examples in quotes

    @property
    def headword(self):
        return self.words[0]

    @property
    def definition(self):
        """The gloss without its examples."""
        return re.split(r'; *"', self.gloss)[0].strip().rstrip(";")


def parse_synset(part, line):
    head, gloss = line.rstrip("\n").split(" | ", 1)
    fields = head.split(" ")
    word_count = int(fields[3], 16)
    words = tuple(fields[4 + 2 * i].replace("_", " ") for i in range(word_count))
    at = 4 + 2 * word_count  # where the pointers begin
    pointers = [fields[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(int(fields[at]))]
    return Synset(
        part=part,
        offset=fields[0],
        words=words,
        lexicographer_file=LEXICOGRAPHER_FILES[int(fields[1])],
        hypernyms=tuple(offset for kind, offset, _, _ in pointers if kind in HYPERNYMS),
        gloss=gloss.strip(),
    )


def read_synsets(folder=DEFAULT_FOLDER):
    """Nouns, then verbs, in file order: {(part, offset): Synset}."""
    synsets = {}
    for part in ("noun", "verb"):
        path = Path(folder) / f"data.{part}"
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise Problem(
                f"WordNet cannot be read: {error.strerror}",
                path,
                "Install Debian's wordnet-base (apt-get install wordnet-base),"
                " or name the folder with --wordnet.",
            ) from None
        for number, line in enumerate(text.split("\n"), start=1):
            if not line or line.startswith("  "):  # the licence stands indented at the top
                continue
            try:
                synset = parse_synset(part, line)
            except (ValueError, IndexError):
                raise Problem(
                    "this is not a synset of WordNet 3.0",
                    f"{path}, line {number}: {line[:60]}",
                    "Reinstall Debian's wordnet-base.",
                ) from None
            synsets[part, synset.offset] = synset
    return synsets


def gloss_text(synsets, stride=97):
    """English prose out of every `stride`-th gloss, examples included, a sentence a line.

    Neighbours in the database are near in meaning, so a stride gives more varied text sooner.
    """
    picked = list(synsets.values())[::stride]
    return "".join(f"{s.headword.capitalize()}: {s.gloss}.\n" for s in picked)


def write_gloss_text(path, folder=DEFAULT_FOLDER):
    Path(path).write_text(gloss_text(read_synsets(folder)), encoding="utf-8")
