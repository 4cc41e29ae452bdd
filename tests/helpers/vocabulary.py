"""A real model with fewer tokens to choose from; its layers stay as they are."""

import gguf

FIRST = 4096  # among them all that are special, and all bytes
OF_TOKENS = (
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
)


def cut_vocabulary(whole, path):
    """Write a model's file anew, with the first tokens and the single characters of ASCII."""
    reader = gguf.GGUFReader(whole)
    kept = tokens_kept(reader)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue  # the writer's own
        if name in OF_TOKENS:
            value = [field.contents(number) for number in kept]
        else:
            value = field.contents()
        writer.add_key_value(name, value, field.types[0], sub_type=field.types[-1])
    for tensor in reader.tensors:
        rows = kept if tensor.name == "token_embd.weight" else slice(None)
        writer.add_tensor(tensor.name, tensor.data[rows], raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokens_kept(reader):
    """Return the numbers of the tokens that stay."""
    tokens = reader.fields["tokenizer.ggml.tokens"]
    kept = []
    for number, part in enumerate(tokens.data):
        text = bytes(tokens.parts[part])
        if number < FIRST or len(text) == 1 or text == "\u2581".encode():
            kept.append(number)
    return kept
