#!/usr/bin/env python3
"""Writes the tokenisation goldens under models/qwen2.5 with Hugging Face tokenizers.

    python3 -m venv .venv && .venv/bin/pip install tokenizers
    .venv/bin/python scripts/gen_tokenizer_goldens.py DIR [--random N --seed S --out FILE]

DIR holds tokenizer.json of the official Qwen2.5 release. Without --random it writes the committed
files: small_tokenizer.json, the same tokenizer with only its first merges, and
mixed_tokenization.json, texts with their ids under both. With --random it writes N further random
texts to FILE, which tests/tokenization.rs reads when QWEN_SERVER_TEST_TOKENIZATION names it.
"""

import argparse
import json
import pathlib
import random
import unicodedata

from tokenizers import Tokenizer

NUM_SMALL_MERGES = 4000

TEXTS = [
    "",
    " ",
    "The quick brown fox jumps over the lazy dog. It's 9 o'clock; they'LL say WE'VE won!",
    "人工智能正在改变世界。今天天气很好，我们去公园散步吧！价格：￥1,234.56",
    "Trí tuệ nhân tạo đang thay đổi thế giới. Hôm nay trời đẹp quá, phải không?",
    "Kecerdasan buatan sedang mengubah dunia. Hari ini cuacanya cerah sekali, bukan?",
    "الذكاء الاصطناعي يغير العالم. كَيْفَ حَالُكَ اليَوْمَ؟ ١٢٣",
    "मशीन लर्निंग दुनिया बदल रही है। क्षत्रिय",
    "ปัญญาประดิษฐ์กำลังเปลี่ยนโลก น้ำ",
    "인공지능이 세상을 바꾸고 있습니다. 한글",
    "人工知能が世界を変えています。ガギグゲゴ パピプ ｶﾞ ﾊﾟ",
    "Искусственный интеллект меняет мир. Ёлка и й",
    "בינה מלאכותית משנה את העולם. שָׁלוֹם",
    "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇻🇳🇮🇩 ☃️ 1️⃣ ©️ 🧑🏿‍🚀🎉🎉🎉",
    "fn main() {\n    let x: Vec<u8> = vec![0; 16];\n\tprintln!(\"{:?}\", x);\r\n}\r\n\r\n",
    "def f(x):\n\n\n    return {\n        'a': x**2,\n\n    }\n        \n",
    "a" * 300 + " " + "ab" * 200,
    " " * 200 + "x" + "\t" * 70 + "\n" * 40 + " \n" * 20 + "  ",
    "0123456789" * 12 + " ١٢٣ Ⅷ ² ½ 〇 ９",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b[31mred\x1b[0m\x7f\x85\xa0\u200b\u200d\u2028\u2029\ufeff\ufffd",
    "ſ 'ſ 'S 'T ’s 'K 'ſt x'RE'Ve",
    unicodedata.normalize("NFD", "Việt Nam: tiếng Việt đẹp. café naïve Åström 한국어 がぎ क़"),
    "q\u0323\u0307 q\u0307\u0323 \u0344 \u212b \u2126 \u1e9b\u0323 \ufb01 \u2000\u2001 \uf900 \U0001d15e",
    "<|im_start|>user\nignore<|im_end|>\n<|endoftext|><|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
    "<|im_start|> <|im_start<|im_end|>|> <|IM_START|> < |im_end|> <|im_end|",
    "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"<|im_end|>\"}}\n</tool_call><tool_response>",
    "[PAD151665] [PAD151935] <|object_ref_start|>x<|video_pad|><|repo_name|>r<|file_sep|>",
    "e<|im_end|>\u0301 cafe\u0301<|im_end|>  \n<|im_end|>  x  <|im_end|>",
    "https://example.com/a?b=c&d=%20#e user@example.com C:\\dir\\file.txt $x_1 += -1e-9; /* c */",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n- [x] done\n> quote\n```rust\nlet a = 1;\n```",
    "x = y\u3000\u3000z\u00a0\u00a0w\u2009\u2009v \u3000\n\u3000 \r\r\n \n\r",
]

ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    " \t\n\r\x0b\x0c\x85\u00a0\u2003\u2028\u3000  \n",
    "0123456789٣५Ⅷ²",
    "'’.,;:!?()[]{}<>|_-+*/\\=#$%&@\"`~^…—“”。，！？",
    "人工智能世界你好吗的是在有不了我他这",
    "àáảãạăằắẳẵặâầấẩẫậđèéẻẽẹêềếểễệ",
    "\u0300\u0301\u0302\u0303\u0306\u0309\u031b\u0323\u0327\u0328\u0653\u0654\u093c\u3099\u309a\u0e33",
    "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "अआइकखगघचछजटतनपमयरलवसह्ािीुेो",
    "가각한글\u1112\u1161\u11ab하세요",
    "🎉🚀👨👩👧👦\u200d\ufe0f🏽🇻🇳😀",
    "\x00\x01\x07\x1b\x7f\u200b\ufeff\ufffd\U0010ffff\U000e0001",
]
WORDS = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<|endoftext|>", "<|fim_pad|>",
         "'s", "'LL", "ſ", "[PAD151700]", " the", "return", "function", "    ", "http://", "<|", "|>"]


def random_text(rng):
    parts = []
    for _ in range(rng.randint(1, 30)):
        kind = rng.random()
        if kind < 0.15:
            parts.append(rng.choice(WORDS))
        elif kind < 0.9:
            alphabet = rng.choice(ALPHABETS)
            parts.append("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 12))))
        else:
            points = (rng.randrange(0x110000) for _ in range(rng.randint(1, 4)))
            parts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    text = "".join(parts)
    return unicodedata.normalize("NFD", text) if rng.random() < 0.2 else text


def shrink(full):
    """The tokenizer with only its first merges: bytes, their results, added tokens, renumbered."""
    merges = full["model"]["merges"][:NUM_SMALL_MERGES]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    kept = {left + right for left, right in pairs}
    tokens = sorted(full["model"]["vocab"], key=full["model"]["vocab"].get)
    tokens = [token for token in tokens if len(token) == 1 or token in kept]
    small = dict(full)
    small["model"] = dict(full["model"], merges=merges, vocab={t: i for i, t in enumerate(tokens)})
    small["added_tokens"] = [
        dict(token, id=len(tokens) + i) for i, token in enumerate(full["added_tokens"])
    ]
    return small


def load(data, with_added=True):
    if not with_added:
        data = dict(data, added_tokens=[])
    return Tokenizer.from_str(json.dumps(data))


def write_lines(path, cases):
    """One case a line, so that a difference can be read."""
    lines = (json.dumps(case, ensure_ascii=True) for case in cases)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()

    full = json.loads((args.dir / "tokenizer.json").read_text())
    small = shrink(full)
    if args.random:
        rng = random.Random(args.seed)
        texts = [random_text(rng) for _ in range(args.random)]
    else:
        texts = TEXTS
    by_name = {
        "ids": load(full),
        "plain_ids": load(full, with_added=False),
        "small_ids": load(small),
        "small_plain_ids": load(small, with_added=False),
    }
    cases = []
    for text in texts:
        case = {"text": text}
        for name, tokenizer in by_name.items():
            case[name] = tokenizer.encode(text).ids
        case["decoded"] = by_name["ids"].decode(case["ids"], skip_special_tokens=False)
        case["decoded_skipping"] = by_name["ids"].decode(case["ids"], skip_special_tokens=True)
        cases.append(case)

    if args.random:
        write_lines(args.out, cases)
        return
    models = pathlib.Path(__file__).resolve().parent.parent / "models" / "qwen2.5"
    write_lines(models / "mixed_tokenization.json", cases)
    text = json.dumps(small, ensure_ascii=False, separators=(",", ":"))
    (models / "small_tokenizer.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
