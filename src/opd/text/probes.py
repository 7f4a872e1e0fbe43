"""Where tokenizers of different families part: digits, white space, code, scripts, normalisation, joined characters."""

PROBES = (
    "The quick brown fox jumps over the lazy dog, again and again; don't, I'LL, we've.",
    " leading, trailing and  double   spaces    ",
    "\ttabs\tand\n\nblank lines\r\nand Windows ones\n \n",
    "1234567890 3.14159 1,000,000 12+7=19 0x1F 2026-01-31 ½ ² ٣",
    "def f(x: int) -> str:\n    return f'{x!r:>8}'  # comment\n",
    "if (a != b && c[0] == '\\n') { x->y += 1; } /* */ <div class=\"q\">&amp;</div>",
    r"$\frac{a^2+b_1}{\sqrt{2}} \leq \int_0^\infty e^{-x}\,dx$ \boxed{42}",
    "naïve café e\u0301 ﬁne Å Å ＡＢＣ ①",
    "Größe, œuvre, Ελλάδα, Россия, עברית, العربية, हिन्दी, ภาษาไทย",
    "中文分词，日本語のテキスト、한국어 문장",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 🇪🇺 👍🏽",
    "zero\u200bwidth\u00a0no-break\u2009thin\ufeff\u202eright to left",
    "aaaaaaaaaaaaaaaa !!!!!!!! ........ -------- ======== ________",
    "https://example.org/a_b?c=d&e=%20#f user@example.org C:\\dir\\file.txt",
    "MixedCaseIdentifierHTTPServer snake_case_name kebab-case UPPER lower",
    "Step 1: sort the letters hgfe -> efgh. The answer is efgh.",
)
