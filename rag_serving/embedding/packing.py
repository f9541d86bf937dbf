"""Short texts through a BERT encoder without padding: all in one row, each attending to itself alone.

Queries differ in length, so a padded batch of them computes a third for nothing. Here the tokens of several texts stand in one sequence;
a block-diagonal mask keeps the texts apart and positions begin anew with each, so a vector is the one that the text would get alone.
The layers are called as plain functions on the model's own weights: for a dozen tokens, finding the way through the modules of a model costs
as much as the arithmetic. The whole of it is one call into torch, which needs no interpreter until it is done.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rag_serving.embedding.cpu import own_thread_count

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

Vectors = npt.NDArray[np.float32]

MOST_TOKENS = 320  # of one row: attention grows with its square


def packed_encoder(model: "SentenceTransformer") -> Callable[[Sequence[str]], Vectors] | None:
    """Vectors (n, dims), not normalised, as `model.encode` gives them; None when the model is not a BERT with mean or CLS pooling.

    Several threads may encode at once, each on its share of the cores. The weights are taken as they are now: change the model's dtype before.
    """
    import torch

    modules: list[Any] = [model[at] for at in range(len(model))]
    kinds = [type(module).__name__ for module in modules[1:]]
    bert: Any = getattr(modules[0], "auto_model", None)
    if kinds not in (["Pooling"], ["Pooling", "Normalize"]) or bert is None:
        return None
    mode, config = modules[1].pooling_mode, bert.config
    if mode not in {"mean", "cls"} or config.model_type != "bert" or config.hidden_act != "gelu":
        return None
    tokenizer = _truncating(modules[0].tokenizer.backend_tokenizer, model.max_seq_length or config.max_position_embeddings)
    forward = _Bert(bert)

    def encode(texts: Sequence[str]) -> Vectors:
        torch.set_num_threads(own_thread_count())
        tokens = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
        return np.concatenate([_pooled(forward, row, cls=mode == "cls") for row in _rows(tokens)])

    return encode


def _truncating(backend: Any, most: int) -> Any:
    tokenizer = type(backend).from_str(backend.to_str())
    tokenizer.no_padding()
    tokenizer.enable_truncation(most)
    return tokenizer


def _rows(tokens: list[list[int]]) -> Iterator[list[list[int]]]:
    """The texts in order, as many to a row as fit."""
    row: list[list[int]] = []
    for ids in tokens:
        if row and sum(map(len, row)) + len(ids) > MOST_TOKENS:
            yield row
            row = []
        row.append(ids)
    yield row


def _pooled(forward: "_Bert", texts: list[list[int]], *, cls: bool) -> Vectors:
    import torch

    lengths = np.array([len(ids) for ids in texts])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    owner = np.repeat(np.arange(len(texts)), lengths)
    ids = torch.tensor([number for row in texts for number in row])
    positions = torch.from_numpy(np.arange(len(owner)) - starts[owner])
    mask = torch.from_numpy(owner[:, None] == owner[None, :]) if len(texts) > 1 else None
    with torch.inference_mode():
        rows: Vectors = forward(ids, positions, mask).float().numpy()
    return rows[starts] if cls else np.asarray(np.add.reduceat(rows, starts, axis=0) / lengths[:, None], dtype=np.float32)


class _Bert:
    """The last hidden state (tokens, hidden) of one row, as in Devlin et al. 2019; the three projections of attention are one matrix."""

    def __init__(self, bert: Any) -> None:
        import torch

        weights: dict[str, Tensor] = bert.state_dict()
        config = bert.config
        self._width, self._heads, self._eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        self._word = weights["embeddings.word_embeddings.weight"]
        self._position = weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
        self._norm = _both(weights, "embeddings.LayerNorm")
        self._layers = []
        for number in range(config.num_hidden_layers):
            layer = f"encoder.layer.{number}."
            projections = [_both(weights, f"{layer}attention.self.{part}") for part in ("query", "key", "value")]
            self._layers.append(
                (
                    tuple(torch.cat(parts) for parts in zip(*projections, strict=True)),
                    _both(weights, f"{layer}attention.output.dense"),
                    _both(weights, f"{layer}attention.output.LayerNorm"),
                    _both(weights, f"{layer}intermediate.dense"),
                    _both(weights, f"{layer}output.dense"),
                    _both(weights, f"{layer}output.LayerNorm"),
                )
            )
        self._alone = _compiled(lambda ids, positions: self._forward(ids, positions, None), torch.arange(5), torch.arange(5))
        self._packed = _compiled(self._forward, torch.arange(6), torch.arange(6), torch.ones(6, 6, dtype=torch.bool))

    def __call__(self, ids: "Tensor", positions: "Tensor", mask: "Tensor | None") -> "Tensor":
        return self._alone(ids, positions) if mask is None else self._packed(ids, positions, mask)

    def _forward(self, ids: "Tensor", positions: "Tensor", mask: "Tensor | None") -> "Tensor":
        """The arithmetic; traced, so no number of tokens may become a constant in it."""
        from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

        state = self._word[ids] + self._position[positions]
        width = (self._width,)
        state = layer_norm(state, width, *self._norm, self._eps)
        for projections, attended, first, up, down, second in self._layers:
            query, key, value = (
                linear(state, *projections).view(-1, 3, self._heads, self._width // self._heads).permute(1, 2, 0, 3)[:, None]
            )
            mixed = scaled_dot_product_attention(query, key, value, mask)[0].transpose(0, 1).flatten(1)
            state = layer_norm(state + linear(mixed, *attended), width, *first, self._eps)
            state = layer_norm(state + linear(gelu(linear(state, *up)), *down), width, *second, self._eps)
        return state


def _compiled(forward: "Callable[..., Tensor]", *example: "Tensor") -> "Callable[..., Tensor]":
    """The same as one call into torch: a hundred calls from Python would each wait for the interpreter while the event loop has it."""
    import torch

    jit: Any = torch.jit
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is not developed any further; what follows it needs a compiler on the machine
        traced = jit.trace(forward, example, check_trace=False)

    def call(*inputs: "Tensor") -> "Tensor":
        with jit.optimized_execution(False):  # it would compile anew for every length
            result: Tensor = traced(*inputs)
        return result

    return call


def _both(weights: "dict[str, Tensor]", name: str) -> "tuple[Tensor, Tensor]":
    return weights[f"{name}.weight"], weights[f"{name}.bias"]
