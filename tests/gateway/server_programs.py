"""What the test servers run: a model for Triton, and a llama.cpp server with random weights. They run in environments
of their own, so they are text here.
"""

from __future__ import annotations

TRITON_MODEL = '''
import time

import numpy as np
import triton_python_backend_utils as pb


def tensor(request, name):
    return pb.get_input_tensor_by_name(request, name).as_numpy()


class TritonPythonModel:
    """Adds numbers and repeats a text, after `sleep_ms`; a batch takes as long as its longest request."""

    def execute(self, requests):
        sleep_ms = [int(tensor(request, "sleep_ms").reshape(-1)[0]) for request in requests]
        if min(sleep_ms) < 0:
            time.sleep(-min(sleep_ms) / 1000)
            raise ValueError("asked to fail")
        time.sleep(max(sleep_ms) / 1000)
        return [self.answer(request) for request in requests]

    def answer(self, request):
        total = tensor(request, "values").sum(axis=-1, keepdims=True).astype(np.int64)
        return pb.InferenceResponse([pb.Tensor("total", total), pb.Tensor("echo", tensor(request, "prompt"))])
'''

TRITON_CONFIG = """
backend: "python"
max_batch_size: 0
input [
  { name: "prompt" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "values" data_type: TYPE_INT64 dims: [ -1 ] },
  { name: "sleep_ms" data_type: TYPE_INT32 dims: [ 1 ] }
]
output [
  { name: "total" data_type: TYPE_INT64 dims: [ 1 ] },
  { name: "echo" data_type: TYPE_STRING dims: [ 1 ] }
]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""

TRITON_BATCHED_CONFIG = TRITON_CONFIG.replace(
    "max_batch_size: 0", "max_batch_size: 8\ndynamic_batching { max_queue_delay_microseconds: 100000 }"
)

LLAMA_SERVER = """
import sys
import time

import gguf
import numpy as np
import xllamacpp

LAYERS, WIDTH, HEADS, HIDDEN, CONTEXT, SLOTS = 2, 64, 4, 128, 16384, 4
path, port = sys.argv[1:]

words = [f"\\u2581w{number}" for number in range(200)]
tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + words
kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.BYTE] * 256
kinds += [gguf.TokenType.NORMAL] * len(words)

writer = gguf.GGUFWriter(path, "llama")
writer.add_context_length(CONTEXT)
writer.add_embedding_length(WIDTH)
writer.add_block_count(LAYERS)
writer.add_feed_forward_length(HIDDEN)
writer.add_head_count(HEADS)
writer.add_head_count_kv(HEADS)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(WIDTH // HEADS)
writer.add_vocab_size(len(tokens))
writer.add_tokenizer_model("llama")
writer.add_token_list(tokens)
writer.add_token_scores([0.0] * len(tokens))
writer.add_token_types(kinds)
writer.add_bos_token_id(1)
writer.add_eos_token_id(2)
writer.add_unk_token_id(0)
writer.add_chat_template("{% for message in messages %}{{ message.content }} {% endfor %}")

drawn = np.random.default_rng(0)


def random_tensor(name, *shape):
    writer.add_tensor(name, (drawn.standard_normal(shape) * 0.1).astype(np.float32))


random_tensor("token_embd.weight", len(tokens), WIDTH)
random_tensor("output.weight", len(tokens), WIDTH)
writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
for layer in range(LAYERS):
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        random_tensor(f"blk.{layer}.{name}.weight", WIDTH, WIDTH)
    random_tensor(f"blk.{layer}.ffn_gate.weight", HIDDEN, WIDTH)
    random_tensor(f"blk.{layer}.ffn_up.weight", HIDDEN, WIDTH)
    random_tensor(f"blk.{layer}.ffn_down.weight", WIDTH, HIDDEN)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

settings = xllamacpp.CommonParams()
settings.model.path = path
settings.hostnames = ["127.0.0.1"]
settings.port = int(port)
settings.n_ctx = CONTEXT * SLOTS
settings.n_parallel = SLOTS
settings.cpuparams.n_threads = 1
settings.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(settings)
while True:
    time.sleep(60)
"""
