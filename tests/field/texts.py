"""Two hundred texts of every kind, for comparing tokenizers."""

import random
from pathlib import Path

_PROSE = (Path(__file__).parents[2] / "deploy" / "calibration.txt").read_text(encoding="utf-8")
_CHOSEN: tuple[str, ...] = (
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n  \n",
    "\t\t tab\tand\r\nreturn\r",
    "Hello, world!",
    " leading and trailing ",
    "  two  and   three    and     five",
    "it's we've I'LL they'D don't 'S",
    "x = 1  # 12345\nif x>=10: return  -3.14e-10",
    'def f(a: int) -> str:\n    """Doc."""\n    return f"{a:>10}"\n\n\nclass A:\n\tpass',
    "#include <vector>\nint main() { std::vector<int> v{1,2,3}; return v[0]; }",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "SELECT * FROM t WHERE a <> 'x' AND b >= 100;",
    "1 12 123 1234 12345 123456 1,234,567.89 0x7fff  3   33    333",
    "١٢٣ ४५६ ½ Ⅷ ²",
    "日本語のテキストです。漢字とかな、カタカナ。",
    "我想在apple工作1314151天~",
    "한국어 문장입니다.",
    "Привет, мир! Ёлка",
    "مرحبا بالعالم",
    "שלום עולם",
    "สวัสดีชาวโลก",
    "नमस्ते दुनिया",
    "Ελληνικά με τόνους",
    "naïve café Zürich ﬁ ligature",
    "e\u0301 n\u0303 combining, \u00e9 \u00f1 composed",
    "🚀 (normal) 😶\u200d🌫️ 👩\u200d👩\u200d👧 🇩🇪 ✅ 🦙🦙",
    "\u200bzero\u200bwidth\ufeff bom \u00a0nbsp\u2003em\u2028line\u2029para\x85next\x0bvt\x0cff",
    "------======= ``````` ......!!!!!!?????? ''''''",
    "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nHi!  2<|im_end|>\n",
    "<|im_start|> <|im_end|><|endoftext|>  <|im_start|>\n\n",
    "text <|endoftext|> text<|endoftext|>text",
    "<repo_name>a/b<file_sep>c.py",
    "<|not_a_token|> <|im_star t|> <s> </s> <unk> [PAD5] <0x0A>",
    "\x00\x01\x1f\x7f control",
    "a" * 300,
    "ab " * 100,
    "https://example.org/path?q=1&r=%20#frag user@example.org",
    "\U0001d518\U0001d52b\U0001d526 \U00010348 \U00013000",
)


def varied_texts() -> list[str]:
    """The same texts always: chosen ones, pieces of prose, and random mixtures of both."""
    draw = random.Random(0)
    texts: list[str] = list(_CHOSEN)
    for _ in range(60):
        start = draw.randrange(len(_PROSE) - 400)
        texts.append(_PROSE[start : start + draw.randrange(1, 400)])
    while len(texts) < 200:
        pieces = [draw.choice(_CHOSEN)[: draw.randrange(1, 30)] for _ in range(draw.randrange(2, 9))]
        texts.append(draw.choice(["", " ", "  ", "\n", "7"]).join(pieces))
    return texts
