"""Writes host/unicode/tables.h: character properties, probed from the libraries whose behaviour the host must equal.

    python host/unicode/generate_tables.py > host/unicode/tables.h

The tokenizer's \\w and \\s are what `tokenizers`' Whitespace pre-tokenizer does with each code point; the rest is what
this Python's str methods do. Written with tokenizers 0.22.2 and Python 3.11 (Unicode 14.0.0).
"""

import sys
import unicodedata

import tokenizers
from tokenizers.pre_tokenizers import Whitespace

SCALARS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]


def probe_pre_tokenizer():
    """The code points that \\w and that \\s match: a word character joins its neighbours, white space vanishes."""
    pre_tokenizer = Whitespace()
    word, space = [], []
    for start in range(0, len(SCALARS), 4096):
        block = SCALARS[start : start + 4096]
        text = "".join(f"a{chr(c)}a " for c in block)
        pieces = {offset: piece for piece, (offset, _) in pre_tokenizer.pre_tokenize_str(text)}
        for index, c in enumerate(block):
            at = 4 * index
            if pieces[at] == f"a{chr(c)}a":
                word.append(c)
            elif at + 1 not in pieces:
                space.append(c)
            else:
                assert pieces[at + 1] == chr(c), hex(c)
    return word, space


def ranges(code_points):
    """[(first, last)] of a sorted list."""
    result = []
    for c in code_points:
        if result and result[-1][1] == c - 1:
            result[-1][1] = c
        else:
            result.append([c, c])
    return result


def upper_runs(lower):
    """Code points whose upper case is one other: [(first, last, step, delta)], step 1 or 2; and the longer ones."""
    runs, longer = [], []
    for c in lower:
        upper = chr(c).upper()
        if len(upper) > 1:
            longer.append((c, upper))
            continue
        delta = ord(upper) - c
        if delta == 0:
            continue
        if runs and runs[-1][3] == delta:
            first, last, step, _ = runs[-1]
            gap = c - last
            if gap in (1, 2) and (first == last or gap == step):
                runs[-1][1:3] = [c, gap]
                continue
        runs.append([c, c, 1, delta])
    return runs, longer


def print_rows(declaration, rows, width=120):
    print(f"\n{declaration} = {{")
    line = "   "
    for row in rows:
        item = " {" + ", ".join(row) + "},"
        if len(line) + len(item) > width:
            print(line)
            line = "   "
        line += item
    print(line)
    print("};")


def print_ranges(comment, name, code_points):
    print(f"\n// {comment}", end="")
    print_rows(
        f"inline constexpr CodePointRange {name}[]", [(hex(first), hex(last)) for first, last in ranges(code_points)]
    )


def main():
    word, space = probe_pre_tokenizer()
    lower = [c for c in SCALARS if chr(c).islower()]
    runs, longer = upper_runs(lower)
    print("// Generated; do not edit: python host/unicode/generate_tables.py > host/unicode/tables.h")
    print(f"// tokenizers {tokenizers.__version__}, Python {sys.version_info.major}.{sys.version_info.minor}.")
    print("// clang-format off\n#pragma once\n\nnamespace vivace::unicode {\n")
    print(f'inline constexpr char kPythonVersion[] = "{unicodedata.unidata_version}";  // of Unicode\n')
    print("struct CodePointRange {\n  char32_t first, last;  // inclusive\n};")
    print("struct UpperRun {\n  char32_t first, last;  // inclusive\n  int step, delta;       // every step-th has its")
    print("                         // upper case delta further\n};")
    print("struct UpperLonger {\n  char32_t from;\n  char32_t to[3];  // 0 where there is no third\n};")
    print_ranges("\\w of the pre-tokenizer.", "kWord", word)
    print_ranges("\\s of the pre-tokenizer.", "kWhiteSpace", space)
    print_ranges("str.isspace.", "kPythonSpace", [c for c in SCALARS if chr(c).isspace()])
    print_ranges("str.islower of one character.", "kPythonLower", lower)
    print("\n// str.upper of lower-case characters, where it is one other character.", end="")
    print_rows(
        "inline constexpr UpperRun kUpperRuns[]", [(hex(a), hex(b), str(step), str(d)) for a, b, step, d in runs]
    )
    print("\n// str.upper of lower-case characters, where it is two or three.", end="")
    print_rows(
        "inline constexpr UpperLonger kUpperLonger[]",
        [(hex(c), "{" + ", ".join(hex(ord(u)) for u in upper.ljust(3, "\0")) + "}") for c, upper in longer],
    )
    print("\n}  // namespace vivace::unicode")


if __name__ == "__main__":
    main()
