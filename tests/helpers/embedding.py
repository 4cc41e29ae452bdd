"""A small embedding model with random weights: nothing about it is real but its kind (BERT)."""

import gguf
import numpy as np

from helpers.models import add_model, config_json, models_lock
from helpers.places import RUNS

LAYERS, WIDTH, INNER, CONTEXT = 4, 384, 1536, 512
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def add_embedding_model(models, name):
    """Put it into a model store."""
    path = RUNS / "bert.gguf"
    with models_lock():
        if not path.exists():
            new = path.with_suffix(".new")
            write_bert(new)
            new.rename(path)
    add_model(models, name, path, config_json("bert", "8M", "F32"))


def split_embedding_model():
    """Write the same model in two files; return their paths."""
    paths = [RUNS / f"bert-0000{number}-of-00002.gguf" for number in (1, 2)]
    with models_lock():
        if not all(path.exists() for path in paths):
            news = [path.with_name(path.name.replace("bert", "new")) for path in paths]
            write_bert(RUNS / "new.gguf", split_max_tensors=40)
            for new, path in zip(news, paths, strict=True):  # an interrupted run left no half
                new.rename(path)
    return paths


def write_bert(path, **options):
    """Write the model's file: its head, its vocabulary, its weights."""
    writer = gguf.GGUFWriter(str(path), "bert", **options)
    writer.add_name("test")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(12)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    tokens = SPECIAL + ["\u2581" + letter for letter in LETTERS] + LETTERS
    add_vocabulary(writer, tokens)
    add_weights(writer, len(tokens))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer, tokens):
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in SPECIAL else normal for token in tokens])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_sep_token_id(3)
    writer.add_eos_token_id(3)
    writer.add_mask_token_id(4)


def add_weights(writer, tokens):
    random = np.random.default_rng(1)

    def matrix(name, *shape):
        values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.05)
        writer.add_tensor(f"{name}.weight", values)

    def norm(name):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(WIDTH, np.float32))

    def linear(name, rows, columns):
        matrix(name, rows, columns)
        writer.add_tensor(f"{name}.bias", np.zeros(rows, np.float32))

    matrix("token_embd", tokens, WIDTH)
    matrix("position_embd", CONTEXT, WIDTH)
    matrix("token_types", 2, WIDTH)
    norm("token_embd_norm")
    for number in range(LAYERS):
        layer = f"blk.{number}."
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            linear(layer + part, WIDTH, WIDTH)
        linear(layer + "ffn_up", INNER, WIDTH)
        linear(layer + "ffn_down", WIDTH, INNER)
        norm(layer + "attn_output_norm")
        norm(layer + "layer_output_norm")
