#!/usr/bin/env bash
# transformers 5: AutoTokenizer takes the words of tokenizer.json, but normalises and splits text as the named class does; numbers become other tokens.
#
# tokenizer.json holds all that a tokenizer does: how text is normalised and split, words, merges. In transformers 4 the class that tokenizer_config.json
# names was a wrapper around it, so one would guess that a complete tokenizer.json gives its own ids, whatever the name is. In transformers 5
# GPT2Tokenizer, Qwen2Tokenizer and others bring a normaliser and a splitting of their own and take only words and merges. A model of type llama whose
# file splits numbers into digits and whose config says GPT2Tokenizer is given tokens such as "202", which it never saw in training, and
# nothing warns. With model type qwen2 the class is Qwen2Tokenizer even where PreTrainedTokenizerFast is named.
# PreTrainedTokenizerFast.from_pretrained reads the file as it is.
#
# Seen: transformers 4.57.6 and 5.24.0, as below. Needs python3 with pip and 300 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/digits.py" <<'PY'
import json
from importlib.metadata import version
from tempfile import mkdtemp

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

words = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["20", "202", "hi", "<|endoftext|>"]
merges = [("2", "0"), ("20", "2"), ("h", "i")]
tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
tokenizer.normalizer = normalizers.Lowercase()
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
tokenizer.decoder = decoders.ByteLevel()
print("transformers", version("transformers"))
print("  tokenizer.json:", " ".join(tokenizer.encode("HI 2024").tokens))
for model, name in (("llama", "PreTrainedTokenizerFast"), ("llama", "GPT2Tokenizer"), ("qwen2", "PreTrainedTokenizerFast")):
    folder = mkdtemp(dir=".")
    tokenizer.save(f"{folder}/tokenizer.json")
    for file, content in {
        "tokenizer_config.json": {"tokenizer_class": name, "eos_token": "<|endoftext|>"},
        "config.json": {"model_type": model},
    }.items():
        with open(f"{folder}/{file}", "w") as opened:
            json.dump(content, opened)
    auto, plain = AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    print(f"  {model}, {name}:", " ".join(auto.tokenize("HI 2024")), "| read as it is:", " ".join(plain.tokenize("HI 2024")))
PY
cd "$folder"
for version in 4.57.6 5.24.0; do
  python3 -m pip install --quiet --target "$folder/$version" "transformers==$version"
  HF_HUB_OFFLINE=1 PYTHONPATH="$folder/$version" python3 -W ignore digits.py 2> /dev/null | tee -a seen
done
diff seen - <<'SEEN'
transformers 4.57.6
  tokenizer.json: hi Ġ 2 0 2 4
  llama, PreTrainedTokenizerFast: hi Ġ 2 0 2 4 | read as it is: hi Ġ 2 0 2 4
  llama, GPT2Tokenizer: hi Ġ 2 0 2 4 | read as it is: hi Ġ 2 0 2 4
  qwen2, PreTrainedTokenizerFast: hi Ġ 2 0 2 4 | read as it is: hi Ġ 2 0 2 4
transformers 5.24.0
  tokenizer.json: hi Ġ 2 0 2 4
  llama, PreTrainedTokenizerFast: hi Ġ 2 0 2 4 | read as it is: hi Ġ 2 0 2 4
  llama, GPT2Tokenizer: H I Ġ 202 4 | read as it is: hi Ġ 2 0 2 4
  qwen2, PreTrainedTokenizerFast: H I Ġ 2 0 2 4 | read as it is: hi Ġ 2 0 2 4
SEEN
echo "as seen before"
