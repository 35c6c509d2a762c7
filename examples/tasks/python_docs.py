"""The task python_docs: which of four endings a sentence of Python's own documentation has.

The text is the one that every CPython carries (pydoc_data), so nothing is downloaded. The three wrong endings are those
of other sentences of the same topic, cut to the same number of words.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

LEAST, MOST, ENDING, CHOICES = 14, 24, 8, 4  # words of a sentence and of its ending; endings to choose from


def sentences() -> dict[str, list[list[str]]]:
    """Sentences of prose by topic, as words; each once, where it comes first."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    found: dict[str, list[list[str]]] = {}
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            lines = [line for line in paragraph.splitlines() if line.strip()]
            # Prose is at the margin and has no signs of code, grammar, tables or headings.
            if not lines or lines[0].startswith((" ", "*", "+", "|")) or re.search(r"::=|>>>|\*\*|==|--|\|", paragraph):
                continue
            for sentence in re.findall(r"[A-Z][^.!?:]*\.(?= [A-Z]|$)", " ".join(" ".join(lines).split())):
                if sentence not in seen and len(sentence.split()) >= LEAST:
                    found.setdefault(topic, []).append(sentence.split())
                    seen.add(sentence)
    return found


def rows() -> Iterator[dict[str, Any]]:
    """Beginning, four endings and which is the true one; always the same."""
    for topic, found in sentences().items():
        chance = random.Random(topic)
        beginnings = Counter(tuple(words[:-ENDING]) for words in found)
        for number, words in enumerate(found):
            others = [other for other in found if other[-ENDING:] != words[-ENDING:]]
            if len(words) > MOST or len(others) < CHOICES - 1:
                continue
            endings = [" ".join(other[-ENDING:]) for other in chance.sample(others, CHOICES - 1)]
            place = number % CHOICES
            endings.insert(place, " ".join(words[-ENDING:]))
            if beginnings[*words[:-ENDING]] == 1 and len({*endings}) == CHOICES:  # else two are right, or the same
                yield {"beginning": " ".join(words[:-ENDING]), "endings": endings, "answer": place}


def load(**_: Any) -> dict[str, Any]:
    """The data as lm-eval takes it."""
    from datasets import Dataset

    return {"test": Dataset.from_list([*rows()])}
