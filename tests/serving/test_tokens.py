"""Token vectors: what the embedding model itself computes for each token, without those that carry no word."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from small_line import MODEL

from rag_serving.errors import ModelError
from rag_serving.models import load_model
from rag_serving.ranking.maxsim import maxsim, unit_rows
from rag_serving.settings import ModelSpec

SENTENCES = ["the bucket of objects", "list objects", "delete the bucket !", "of the and", "objects list bucket delete"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "of", "and", "!", "bucket", "objects", "list", "delete"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny BERT with random weights as a sentence-transformers model."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(4)
    root = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **marks).save_pretrained(root / "bert")
        BertModel(config).save_pretrained(root / "bert")
        bert = Transformer(str(root / "bert"))
        SentenceTransformer(modules=[bert, Pooling(bert.get_embedding_dimension(), "mean")], device="cpu").save_pretrained(str(root / "st"))
    return root / "st"


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    spec = ModelSpec(name="tiny", source=f"path:{folder}", dims=32, max_tokens=16, dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model(spec, tmp_path_factory.mktemp("models"))


def test_they_are_what_sentence_transformers_gives(folder, model):
    """Token vectors equal those of ST's MultiVectorEncoder over the same weights, and so do MaxSim scores but for the mean; words alone stay."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    normalise = Normalize(module_input_name="token_embeddings", module_output_name="token_embeddings")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = MultiVectorEncoder(modules=[Transformer(str(folder)), MultiVectorMask(), normalise], device="cpu")
        theirs = [np.asarray(rows) for rows in peer.encode_document(SENTENCES, show_progress_bar=False)]
    kept = [[at for at, word in enumerate(text.split(), start=1) if word in WORDS[9:]] for text in SENTENCES]
    ours = model.encode_tokens(SENTENCES, query=False)
    for text, rows, every, places in zip(SENTENCES, ours, theirs, kept, strict=True):
        assert rows == pytest.approx(every[places or slice(None)], abs=1e-5), text
    query = theirs[1][[1, 2]]
    with_words = [every[places] for every, places in zip(theirs, kept, strict=True) if places]
    scores = peer.similarity(query[None], with_words) if hasattr(peer, "similarity") else None
    ours_with_words = [rows for rows, places in zip(ours, kept, strict=True) if places]
    assert maxsim(ours[1], ours_with_words) * 2 == pytest.approx(np.asarray(scores)[0], abs=1e-4)


def test_a_batch_changes_nothing(model):
    """A text's token vectors are the same alone and among longer ones, in the order given."""
    together = model.encode_tokens(SENTENCES, query=False)
    for text, rows in zip(SENTENCES, together, strict=True):
        assert rows == pytest.approx(model.encode_tokens([text], query=False)[0], abs=1e-5)
        assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(len(rows)), abs=1e-5)


def test_long_text_is_cut(model):
    """Tokens past the model's longest input give no vectors: 14 words between the two markers."""
    assert len(model.encode_tokens(["bucket " * 50], query=False)[0]) == 14


def test_a_static_model_gives_the_rows_of_its_table(tmp_path):
    """For a static embedding the token vectors are its table's, whatever stands beside them; text without tokens still has one."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    table = np.random.default_rng(5).normal(size=(len(WORDS), 8)).astype(np.float32)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=table)], device="cpu").save_pretrained(str(tmp_path / "st"))
    static = load_model(ModelSpec(name="static", source=f"path:{tmp_path / 'st'}", dims=8, max_tokens=16), tmp_path)
    found = static.encode_tokens(["the bucket of objects", ""], query=True)
    assert found[0] == pytest.approx(unit_rows(table[[9, 10]]), abs=1e-5)
    assert found[1].shape == (1, 8)


def test_the_hashed_model_has_a_vector_a_word():
    """Each word but function words gives the vector that it would have as a text; prompts are put before as for sentences."""
    assert MODEL.encode_tokens(["the bucket of objects"], query=True)[0] == pytest.approx(
        MODEL.encode_queries(["bucket", "objects"]), abs=1e-6
    )
    assert len(MODEL.encode_tokens(["of the"], query=True)[0]) == 2


def test_a_model_without_token_vectors_says_so():
    """An architecture without them is a ModelError that names the setting, not a crash later."""
    from dataclasses import replace

    with pytest.raises(ModelError, match="no token vectors"):
        replace(MODEL, tokens=None).encode_tokens(["word"], query=True)
