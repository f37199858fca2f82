"""llama.cpp in a process of its own: what it writes after a prompt, greedily.

  python llama.py FILE.gguf PROMPT N

Prints JSON: the text, and for each token its id and log-probability. PROMPT is
text, or ids as a JSON list.
"""

import json
import sys

import xllamacpp


def main(path, prompt, n):
  params = xllamacpp.CommonParams()
  params.model.path = path
  params.n_ctx = 256
  params.cpuparams.n_threads = 1
  # Halves of the cache's numbers would be lost by default.
  params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
  params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
  off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
  params.flash_attn_type = off
  params.verbosity = -1
  server = xllamacpp.Server(params)
  answer = server.handle_completions(
    {
      "prompt": json.loads(prompt) if prompt.startswith("[") else prompt,
      "temperature": 0,
      "n_predict": int(n),
      "logprobs": 1,
      "ignore_eos": True,
    }
  )
  answer = json.loads(answer) if isinstance(answer, str) else answer
  (choice,) = answer["choices"]
  tokens = [(t["id"], t["logprob"]) for t in choice["logprobs"]["content"]]
  print(json.dumps({"text": choice["text"], "tokens": tokens}))


if __name__ == "__main__":
  main(*sys.argv[1:])
