"""A real embedding model without weights: hashed words and character n-grams, in numpy.

It is deterministic on every machine, loads in milliseconds and ranks by shared vocabulary, so that pipelines and tests run where no weights
can be had.
Signed feature hashing after Weinberger et al. 2009 ("Feature Hashing for Large Scale Multitask Learning"), with 1 + ln(tf) term weights.
"""

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

TOKEN = re.compile(r"\w+|[^\w\s]+")  # what the tokenizers package calls Whitespace
GRAMS = (3, 4)
GRAM_SHARE = 0.5  # the weight of a word's n-grams together, beside 1 for the word
PARAMETERS = f"hashing 1; nfkc casefold; {TOKEN.pattern}; grams {GRAMS} share {GRAM_SHARE}; blake2b; 1+ln(tf); weight ln(1+len)"


def embed(texts: Sequence[str], *, dims: int, max_tokens: int) -> npt.NDArray[np.float32]:
    """One unnormalised row a text, (n, dims); the zero row for a text without tokens. Tokens past `max_tokens` are ignored."""
    rows = np.zeros((len(texts), dims), dtype=np.float32)
    for row, text in zip(rows, texts, strict=True):
        words = TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())[:max_tokens]
        for word, count in sorted(Counter(words).items()):
            places, values = _features(word, dims)
            np.add.at(row, places, values * np.float32(1.0 + math.log(count)))
    return rows


@lru_cache(maxsize=65536)
def _features(word: str, dims: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    edged = f"<{word}>"
    grams = sorted({edged[at : at + size] for size in GRAMS for at in range(len(edged) - size + 1)} - {edged})
    weights = [1.0, *(GRAM_SHARE / math.sqrt(len(grams)) for _ in grams)]
    hashes = [int.from_bytes(hashlib.blake2b(f"{feature}".encode(), digest_size=8).digest(), "little") for feature in (edged, *grams)]
    places = np.array([value % dims for value in hashes], dtype=np.int64)
    signs = np.array([1.0 if value >> 63 else -1.0 for value in hashes])
    return places, (signs * np.array(weights) * math.log(1 + len(word))).astype(np.float32)
