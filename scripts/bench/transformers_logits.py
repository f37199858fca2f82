"""Worker of `scripts.convert --mode=verify`: logits by `transformers`.

python -m scripts.bench.transformers_logits FOLDER TOKENS.npy OUT.npy
"""

import pathlib
import sys

import numpy as np
import torch
import transformers


def main(folder: str, tokens: str, out: str) -> None:
  """Writes float32 logits [B, T, C] of int32 tokens [B, T]."""
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  config = transformers.AutoConfig.from_pretrained(
    folder, trust_remote_code=False
  )
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, config=config, dtype=torch.float32, trust_remote_code=False
  )
  rows = torch.from_numpy(np.load(tokens)).long()
  with torch.no_grad():
    logits = model.eval()(rows).logits
  np.save(pathlib.Path(out), logits.numpy())


if __name__ == "__main__":
  if len(sys.argv) != 4:
    print(__doc__)
    sys.exit(0 if "--help" in sys.argv else 2)
  main(*sys.argv[1:])
