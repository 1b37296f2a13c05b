"""Texts that are all unlike each other.

Two texts are near duplicates where their ROUGE-L (the F-measure of their longest common subsequence of words; Lin,
2004) reaches a threshold, which Self-Instruct sets to 0.7 (Wang et al., 2022).
"""

from __future__ import annotations

from collections import Counter, defaultdict

from attar.collect.rows import words

__all__ = ["Unlike", "rouge_l"]


def rouge_l(one: list[str], other: list[str]) -> float:
    """2 x length of the longest common subsequence / words of both; 1 where both are empty."""
    if not one and not other:
        return 1.0
    places: defaultdict[str, int] = defaultdict(int)
    for place, word in enumerate(one):
        places[word] |= 1 << place
    # Bit-parallel (Hyyrö, 2004): a zero in `row` is a word of `one` that the common subsequence grows by.
    every = (1 << len(one)) - 1
    row = every
    for word in other:
        matches = row & places[word]
        row = ((row + matches) | (row - matches)) & every
    return 2 * (len(one) - row.bit_count()) / (len(one) + len(other))


class Unlike:
    """A growing set of texts without near duplicates.

    Args:
        similarity: ROUGE-L from which two texts are near duplicates.
    """

    def __init__(self, similarity: float) -> None:
        self._similarity = similarity
        self._texts: list[tuple[str, list[str]]] = []
        self._wordless: str | None = None
        # The k-th time that a word stands in a text -> the texts where it does: what two texts share of these bounds
        # their longest common subsequence.
        self._holders: defaultdict[tuple[str, int], list[int]] = defaultdict(list)

    def add(self, text: str) -> str | None:
        """Take a text in; an earlier one that it is a near duplicate of, where there is one, which keeps it out."""
        said = words(text)
        if not said:
            if self._wordless is not None:
                return self._wordless
            self._wordless = text
            return None
        marks = list(_numbered(said))
        shared = Counter(holder for mark in marks for holder in self._holders.get(mark, ()))
        for holder, count in shared.most_common():
            earlier, theirs = self._texts[holder]
            most = 2 * count / (len(said) + len(theirs))
            if most >= self._similarity and rouge_l(theirs, said) >= self._similarity:
                return earlier
        for mark in marks:
            self._holders[mark].append(len(self._texts))
        self._texts.append((text, said))
        return None


def _numbered(said: list[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    marks = []
    for word in said:
        seen[word] += 1
        marks.append((word, seen[word]))
    return marks
