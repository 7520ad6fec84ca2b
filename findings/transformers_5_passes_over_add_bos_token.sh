#!/usr/bin/env bash
# transformers 5: where there is a tokenizer.json, add_bos_token of tokenizer_config.json counts no more; a model loses the token that began all of its texts.
#
# In transformers 4 LlamaTokenizerFast put the first token in front of a text, or none, as add_bos_token says, whatever post-processor tokenizer.json had. DeepSeek's
# tokenizers are so: the file has no first token, the setting is true (github.com/huggingface/swift-transformers/issues/161). transformers 5 takes the setting out before the
# tokenizer is made, for every class, and nothing warns. A setting of false is passed over as well.
#
# Seen: transformers 4.57.6 and 5.24.0, as below. Needs python3 with pip and 300 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/begins.py" <<'PY'
import json
from importlib.metadata import version
from tempfile import mkdtemp

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

print("transformers", version("transformers"))
words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<bos>", "<eos>"]
for in_file, setting in ((False, True), (True, False)):
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A" if in_file else "$A", special_tokens=[("<bos>", words.index("<bos>"))]
    )
    folder = mkdtemp(dir=".")
    tokenizer.save(f"{folder}/tokenizer.json")
    settings = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": setting}
    for file, content in {"tokenizer_config.json": settings, "config.json": {"model_type": "deepseek_v3"}}.items():
        with open(f"{folder}/{file}", "w") as opened:
            json.dump(content, opened)
    read = AutoTokenizer.from_pretrained(folder)
    print(f"  in tokenizer.json: {in_file}, add_bos_token: {setting}:", " ".join(read.convert_ids_to_tokens(read("hi")["input_ids"])))
PY
cd "$folder"
for version in 4.57.6 5.24.0; do
  python3 -m pip install --quiet --target "$folder/$version" "transformers==$version"
  HF_HUB_OFFLINE=1 PYTHONPATH="$folder/$version" python3 -W ignore begins.py 2> /dev/null | tee -a seen
done
diff seen - <<'SEEN'
transformers 4.57.6
  in tokenizer.json: False, add_bos_token: True: <bos> h i
  in tokenizer.json: True, add_bos_token: False: h i
transformers 5.24.0
  in tokenizer.json: False, add_bos_token: True: h i
  in tokenizer.json: True, add_bos_token: False: <bos> h i
SEEN
echo "as seen before"
