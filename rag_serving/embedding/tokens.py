"""The vectors of a text's tokens, out of the same model that gives its sentence vector: no weights beside the embedding model's.

For a transformer they are its last hidden states, what sentence-transformers' `MultiVectorEncoder` gives with its `Transformer` alone; for a
static model the rows of its table. Tokens without a word of their own (markers, punctuation, function words) are left out: they are about
half of a text and say little. torch is imported by what needs it.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rag_serving.embedding import hashing
from rag_serving.wording import terms

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

Vectors = npt.NDArray[np.float32]
TokenEncoding = Callable[[Sequence[str]], list[Vectors]]

RULE = "words"  # which tokens are kept; part of what the stored vectors are
_PIECE_MARKS = re.compile(r"^(##|\u2581|\u0120)")
_BATCH = 32


def transformer_tokens(model: "SentenceTransformer", tokenizer: "Tokenizer") -> TokenEncoding | None:
    """Token vectors of a transformer or static model, by its own tokenizer; None for another architecture.

    Each text gives float32 (tokens, dims), not normalised, at least one row; text past the model's longest input is cut. May run beside the
    model's `encode` in another thread.
    """
    first: Any = model[0]
    cutting = type(tokenizer).from_str(tokenizer.to_str())
    if type(first).__name__ == "StaticEmbedding":
        table: Vectors = first.embedding.weight.detach().float().numpy()
        cutting.enable_truncation(first.tokenizer.truncation["max_length"] if first.tokenizer.truncation else 1 << 20)
        kept = _kept(cutting, size=len(table))
        return lambda texts: [table[_some(np.array(ids, dtype=np.int64), kept)] for ids in _ids(cutting, texts, special=False)]
    bert = getattr(first, "auto_model", None)
    if bert is None or [type(module).__name__ for module in list(model)[1:]] not in (["Pooling"], ["Pooling", "Normalize"]):
        return None
    cutting.enable_truncation(model.max_seq_length or bert.config.max_position_embeddings)
    kept = _kept(cutting, size=bert.config.vocab_size)

    def encode(texts: Sequence[str]) -> list[Vectors]:
        every = [np.array(ids, dtype=np.int64) for ids in _ids(cutting, texts, special=True)]
        longest_first = sorted(range(len(texts)), key=lambda at: -len(every[at]))
        found: list[Vectors] = [np.empty((0, 0), dtype=np.float32)] * len(texts)
        for start in range(0, len(texts), _BATCH):
            batch = longest_first[start : start + _BATCH]
            states = _hidden_states(bert, [every[at] for at in batch])
            for at, state in zip(batch, states, strict=True):
                ids = every[at]
                found[at] = state[: len(ids)][_word_places(ids, kept)]
        return found

    return encode


def hashing_tokens(*, dims: int, max_tokens: int) -> TokenEncoding:
    """Token vectors of the hashed model: the vector of each word alone."""

    def encode(texts: Sequence[str]) -> list[Vectors]:
        found = []
        for text in texts:
            words = hashing.TOKEN.findall(text)[:max_tokens] or [text]
            kept = [word for word in words if next(terms(word), None)] or words
            found.append(hashing.embed(kept, dims=dims, max_tokens=max_tokens))
        return found

    return encode


def _hidden_states(bert: Any, texts: Sequence[npt.NDArray[np.int64]]) -> Vectors:
    import torch

    ids = np.full((len(texts), max(map(len, texts))), bert.config.pad_token_id or 0, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    with torch.inference_mode():
        states: Vectors = bert(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state.float().numpy()
    return states


def _ids(tokenizer: "Tokenizer", texts: Sequence[str], *, special: bool) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)]


def _kept(tokenizer: "Tokenizer", *, size: int) -> npt.NDArray[np.bool_]:
    """Which token ids stand for a word or a part of one."""
    kept = np.zeros(size, dtype=bool)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for piece, number in tokenizer.get_vocab().items():
        if number < size and piece not in special:
            kept[number] = next(terms(_PIECE_MARKS.sub("", piece)), None) is not None
    return kept


def _word_places(ids: npt.NDArray[np.int64], kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    places = np.flatnonzero(kept[ids])
    return places if len(places) else np.arange(len(ids))


def _some(ids: npt.NDArray[np.int64], kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The ids of words; all when there is none, and id 0 for a text without tokens."""
    return ids[_word_places(ids, kept)] if len(ids) else np.zeros(1, dtype=np.int64)
