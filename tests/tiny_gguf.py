"""Makes a llama of one layer with random weights: python tiny_gguf.py FILE. Needs gguf, which brings numpy."""

import sys

import gguf
import numpy

WIDTH, HEADS, INNER, CONTEXT = 32, 4, 64, 2048
WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
KINDS = [2, 3, 3, *[6] * 256]                                          # unknown, control, byte


def write(file: str) -> None:
    chance = numpy.random.default_rng(7)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_pooling_type(gguf.PoolingType.MEAN)                     # so that it embeds, too
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([0.0] * len(WORDS))
    writer.add_token_types(KINDS)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    wide = {"token_embd": (len(WORDS), WIDTH), "output": (len(WORDS), WIDTH)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        wide[f"blk.0.{name}"] = (WIDTH, WIDTH)
    wide |= {"blk.0.ffn_gate": (INNER, WIDTH), "blk.0.ffn_up": (INNER, WIDTH), "blk.0.ffn_down": (WIDTH, INNER)}
    for name, shape in wide.items():
        weights = chance.normal(0, 0.3, shape).astype(numpy.float32)
        if name == "output":
            weights[WORDS.index("</s>")] *= 4                          # likely, so that answers end
        writer.add_tensor(f"{name}.weight", weights)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", numpy.ones(WIDTH, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(sys.argv[1])
