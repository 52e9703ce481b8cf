"""Finds the places in device code where one fault can be put, and writes them all into the source,
each behind a switch (mutate_cuda.py says what for).

A mutant is a set of insertions and replacements; with the switch off the code computes what it did:

    block_sync();     (QK_M(7) ? void() : block_sync());             no barrier or wait
    copy_wait<1>();   (QK_M(7) ? copy_wait<2>() : copy_wait<1>());   it ends a group early
    16                (16 + QK_M(7))                                 off by one
    a[i]              a[(i) + QK_M(7)]
    a < b             a < QK_M(7) + b                                a <= b
    if (a && b)       if (a && (QK_M(7) || (b)))                     (a part of) a predicate is true
    a ? b : c         (QK_M(7) != bool(a)) ? b : c                   min is max
    a + b, a += b     a + QK_SIGN(7) * b                             a sign
    a >> 4            a >> QK_ON(7) * 4                              no shift
    a / 4, a % 4      quotient<7>(a, 4)                              lane / 4 is lane % 4
    0x0f0f            (QK_M(7) ? 0xf0f0 : 0x0f0f)                    the other nibbles
    i                 (QK_M(7) ? j : i)                              another index
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

TOKEN = re.compile(
    r"""(?P<skip>//[^\n]*|/\*.*?\*/|^[ \t]*\#(?:[^\n\\]|\\.)*)
      |(?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      |(?P<number>(?:0[xX][0-9a-fA-F']+|\d[\d']*\.?\d*(?:[eE][+-]?\d+)?|\.\d+)[a-zA-Z_]*)
      |(?P<name>[A-Za-z_]\w*)
      |(?P<sign><<=|>>=|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|::|\S)""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
OPEN, CLOSE = "([{", ")]}"
# Calls that only order things: device_fence and the rest of what the emulator checks.
ORDERING = ("block_sync", "warp_sync", "copy_wait", "copy_commit", "mbarrier_wait", "device_fence")
ORDERING += ("dependency_wait",)
SWAPPED = {"i": "j", "j": "i", "g": "t", "t": "g", "h": "q", "q": "h", "r": "c", "w": "i"}
TYPES = {"int", "int64_t", "uint32_t", "uint64_t", "int32_t", "unsigned", "auto", "float", "bool"}
ENDS_OPERAND = {",", ";", "?", ":", "&&", "||", "=", "return", "{", "}", "(", ")", "[", "]"}


@dataclass(frozen=True)
class Edit:
    """Text put in place of [first, last) of the source. Empty ranges are insertions: `outer` is
    the extent of the whole mutant, by which those at one place nest."""

    first: int
    last: int
    text: str
    opens: bool = True


@dataclass
class Mutant:
    id: int
    file: str
    line: int
    text: str  # of the line
    change: str
    place: int  # which one of the file's, whatever other files there are
    edits: list[Edit] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.change}: {self.text}"


@dataclass
class Token:
    kind: str
    text: str
    first: int
    last: int


class Source:
    """The tokens of a file, the brackets that belong together, and what is device code."""

    def __init__(self, text: str) -> None:
        self.source = text
        self.tokens = [
            Token(str(m.lastgroup), m.group(), m.start(), m.end())
            for m in TOKEN.finditer(text)
            if m.lastgroup != "skip"
        ]
        self.mate: dict[int, int] = {}
        stack: list[int] = []
        for i, token in enumerate(self.tokens):
            if token.kind == "sign" and token.text in OPEN:
                stack.append(i)
            elif token.kind == "sign" and token.text in CLOSE:
                self.mate[i] = stack.pop()
                self.mate[self.mate[i]] = i
        self.fixed = self._constant_tokens()

    def spaced(self, i: int) -> bool:
        """A binary operator, as clang-format writes it."""
        t = self.tokens[i]
        return self.source[t.first - 1].isspace() and self.source[t.last].isspace()

    def bodies(self) -> list[tuple[int, int]]:
        """Token ranges of the bodies of functions that run on the device."""
        found, i = [], 0
        while i < len(self.tokens):
            if self.tokens[i].text in ("__device__", "__global__"):
                while self.tokens[i].text not in ("{", ";"):
                    i = self.mate[i] if self.tokens[i].text == "(" else i
                    i += 1
                if self.tokens[i].text == "{":
                    found.append((i + 1, self.mate[i]))
                    i = self.mate[i]
            i += 1
        return found

    def _template_end(self, i: int) -> int:
        """The token behind the `>` that closes the `<` at i, or i where it is no bracket."""
        depth, j = 0, i
        while j < len(self.tokens) and j < i + 60:
            text = self.tokens[j].text
            if text == "<":
                depth += 1
            elif text in (">", ">>"):
                depth -= len(text)
                if depth <= 0:
                    return j + 1
            elif text in OPEN and j in self.mate:
                j = self.mate[j]
            elif text in (";", "{", "}"):
                return i
            j += 1
        return i

    def _constant_tokens(self) -> set[int]:
        """Tokens of what the compiler must know."""
        fixed: set[int] = set()
        for i, token in enumerate(self.tokens):
            text = token.text
            if text == "<" and not self.spaced(i):
                fixed.update(range(i, self._template_end(i)))
            elif text in ("static_assert", "alignas", "asm", "__launch_bounds__", "sizeof"):
                j = i + 1
                while self.tokens[j].text != "(":
                    j += 1
                fixed.update(range(i, self.mate[j] + 1))
            elif text == "constexpr" and self.tokens[i - 1].text == "if":
                fixed.update(range(i, self.mate[i + 1] + 1))
            elif text in ("constexpr", "using", "case", "enum", "template"):
                j = i
                stop = ":" if text == "case" else ";"
                while self.tokens[j].text not in (stop, "{"):
                    j = self.mate[j] if self.tokens[j].text in OPEN and j in self.mate else j
                    j += 1
                if text != "template":
                    fixed.update(range(i, j + 1))
            elif text == "[" and self._declares(i):
                fixed.update(range(i, self.mate[i] + 1))
        return fixed

    def _declares(self, i: int) -> bool:
        """Whether the `[` at i gives the size of an array, as in `float a[4] = {}, b[4];`."""
        j, comma = i - 1, False
        while i - j < 80:
            text = self.tokens[j].text
            initializer = text == "}" and self.tokens[self.mate[j] - 1].text == "="
            if text in (";", "{", "}", "(") and not initializer:
                break
            if text in CLOSE:
                j = self.mate[j]
            elif text in ("return", "+=", "-=", "*=", "|=", "?", ".") or (
                text == "=" and not comma
            ):
                return False
            comma = comma or text == ","
            j -= 1
        first, second = self.tokens[j + 1], self.tokens[j + 2]
        if first.text == "const":
            first, second = second, self.tokens[j + 3]
        return first.kind == "name" and (second.kind == "name" or second.text in ("&", "*", "<"))

    # ---- extents of operands ----

    def left_end(self, i: int) -> int:
        """The first token of the operand that ends before operator i: back to a bracket, a comma,
        an operator of lower precedence."""
        j = i - 1
        while self.tokens[j].text not in ENDS_OPERAND or self.tokens[j].text in CLOSE:
            if self.tokens[j].text in (")", "]"):
                j = self.mate[j]
            elif self.tokens[j].text == "}":
                break
            j -= 1
        return j + 1

    def right_end(self, i: int) -> int:
        """The token behind the operand that begins at i."""
        j = i
        while self.tokens[j].text not in ENDS_OPERAND or self.tokens[j].text in OPEN:
            j = self.mate[j] if self.tokens[j].text in OPEN else j
            j += 1
        return j

    def primary_left(self, i: int) -> int | None:
        """The first token of a chain of factors, a * b[i] / f(c), that ends before operator i."""
        j = i
        while True:
            j -= 1
            t = self.tokens[j]
            if t.text in (")", "]"):
                j = self.mate[j]
                while self.tokens[j - 1].kind == "name" or self.tokens[j - 1].text in ("]", ")"):
                    j -= 1
                    j = self.mate[j] if self.tokens[j].text in ("]", ")") else j
                    if self.tokens[j].kind == "name" and self.tokens[j - 1].text not in (".", "->"):
                        break
            elif t.kind not in ("name", "number"):
                return None
            while self.tokens[j - 1].text in (".", "->", "::"):
                j -= 2
                if self.tokens[j].text in (")", "]"):
                    return None
            if self.tokens[j].text in ("return", "if", "for", "while") or (
                self.tokens[j - 1].text == ">" and not self.spaced(j - 1)
            ):
                return None
            if self.tokens[j - 1].text in ("*", "/", "%") and self.spaced(j - 1):
                j -= 1
                continue
            if self.tokens[j - 1].text in ("-", "!", "~", "*", "&") and not self.spaced(j - 1):
                return None
            return j

    def primary_right(self, i: int) -> int | None:
        """The token behind the factor that begins at i."""
        t = self.tokens[i]
        if t.text == "(":
            j = self.mate[i] + 1
        elif t.kind in ("name", "number"):
            j = i + 1
        else:
            return None
        while True:
            text = self.tokens[j].text
            if text in ("(", "["):
                j = self.mate[j] + 1
            elif text in (".", "->", "::"):
                j += 2
            elif text == "<" and not self.spaced(j):
                j = self._template_end(j)
            else:
                return j


class Finder:
    def __init__(self, file: str, text: str, first_id: int) -> None:
        self.file, self.code, self.next = file, Source(text), first_id
        self.lines = text.split("\n")
        self.found: list[Mutant] = []

    def add(self, at: int, change: str, *edits: tuple[int, int, str] | Edit) -> None:
        """`at` is a token; `@` in a text is the mutant's number."""
        line = self.code.source.count("\n", 0, self.code.tokens[at].first) + 1
        number = self.next
        self.next += 1
        made = [
            Edit(e.first, e.last, e.text.replace("@", str(number)), e.opens)
            if isinstance(e, Edit)
            else Edit(e[0], e[1], e[2].replace("@", str(number)))
            for e in edits
        ]
        text = self.lines[line - 1].strip()
        self.found.append(Mutant(number, self.file, line, text, change, len(self.found), made))

    def around(self, first: int, last: int, before: str, after: str) -> tuple[Edit, Edit]:
        """Insertions around the tokens [first, last)."""
        a, b = self.code.tokens[first].first, self.code.tokens[last - 1].last
        return Edit(a, a, before), Edit(b, b, after, opens=False)

    def run(self) -> list[Mutant]:
        for first, last in self.code.bodies():
            for i in range(first, last):
                if i not in self.code.fixed:
                    self.visit(i)
        return self.found

    def visit(self, i: int) -> None:
        token = self.code.tokens[i]
        if token.kind == "number":
            self.number(i)
        elif token.kind == "name":
            self.name(i)
        elif token.text == "[":
            self.index(i)
        elif self.code.spaced(i):
            self.operator(i)

    def number(self, i: int) -> None:
        token = self.code.tokens[i]
        text = token.text.replace("'", "")
        hexadecimal = text.lower().startswith("0x")
        if not hexadecimal and re.search(r"[.eEfF]", text):
            return
        value = int(re.sub(r"[uUlL]+$", "", text), 0)
        nibbles = (
            re.fullmatch(r"(?:0?f)?(?:0f)+|(?:f0)+", text.lower()[2:]) if hexadecimal else None
        )
        if nibbles:
            other = value >> 4 if text.endswith("0") else (value << 4) & 0xFFFFFFFF
            self.add(i, "other nibbles", *self.around(i, i + 1, f"(QK_M(@) ? {other}u : ", ")"))
            return
        self.add(i, f"{token.text} + 1", *self.around(i, i + 1, "(", " + QK_M(@))"))

    def name(self, i: int) -> None:
        tokens, token = self.code.tokens, self.code.tokens[i]
        if token.text in ORDERING:
            j = self.code._template_end(i + 1) if tokens[i + 1].text == "<" else i + 1
            if tokens[j].text != "(" or tokens[i - 1].text in (".", "->"):
                return
            end = self.code.mate[j] + 1
            self.add(i, f"no {token.text}", *self.around(i, end, "(QK_M(@) ? void() : ", ")"))
            if token.text == "copy_wait":
                argument = self.code.source[tokens[i + 1].last : tokens[j - 1].first]
                more = f"(QK_M(@) ? copy_wait<({argument}) + 1>() : "
                self.add(i, "copy_wait of one group more", *self.around(i, end, more, ")"))
        elif token.text == "if" and tokens[i + 1].text == "(":
            end = self.code.mate[i + 1]
            declares = any(t.text in TYPES for t in tokens[i + 2 : i + 4])
            if not declares:
                self.add(i, "if (true)", *self.around(i + 2, end, "QK_M(@) || (", ")"))
                self.add(i, "if (false)", *self.around(i + 2, end, "!QK_M(@) && (", ")"))
        elif token.text in SWAPPED:
            before, after = tokens[i - 1], tokens[i + 1]
            declared = before.kind == "name" or before.text in (">", "*", "&", ".", "->", "::")
            changed = after.text in ("=", "++", "--", "(", "[", ".", "->") or after.text[-1:] == "="
            if (declared and not self.code.spaced(i - 1)) or before.text in ("++", "--") or changed:
                return
            other = SWAPPED[token.text]
            if after.text in (",", ")") and tokens[i - 1].text in TYPES:
                return
            swap = self.around(i, i + 1, f"(QK_M(@) ? {other} : ", ")")
            self.add(i, f"{token.text} is {other}", *swap)

    def index(self, i: int) -> None:
        tokens, end = self.code.tokens, self.code.mate[i]
        indexes = tokens[i - 1].kind == "name" or tokens[i - 1].text in ("]", ")")
        if not indexes or end == i + 1 or tokens[i - 1].text in ("return", "auto"):
            return
        if end == i + 2 and tokens[i + 1].kind == "number":
            return  # the number is a mutant of its own
        self.add(i, "index + 1", *self.around(i + 1, end, "(", ") + QK_M(@)"))

    def operator(self, i: int) -> None:
        code, text = self.code, self.code.tokens[i].text
        place = (code.tokens[i].last, code.tokens[i].last)
        others = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "== 1 +"}
        if text in others:
            sign = "-" if text in ("<=", ">") else ""
            if not self.is_extremum(i):
                self.add(i, f"{text} is {others[text]}", (*place, f" {sign}QK_M(@) +"))
        elif text in ("+", "-"):
            self.add(i, f"{text} is the other sign", (*place, " QK_SIGN(@) *"))
        elif text in ("+=", "-=") and not self.in_for_header(i):
            end = code.right_end(i + 1)
            self.add(
                i, f"{text} of the other sign", *self.around(i + 1, end, "QK_SIGN(@) * (", ")")
            )
        elif text in ("<<", ">>"):
            self.add(i, f"no {text}", (*place, " QK_ON(@) *"))
        elif text in ("/", "%"):
            first, last = code.primary_left(i), code.primary_right(i + 1)
            if first is None or last is None:
                return
            function = "quotient" if text == "/" else "rest"
            before, after = self.around(first, last, f"::qk::emu::{function}<@>(", ")")
            token = code.tokens[i]
            self.add(i, f"{text} is another", before, after, (token.first, token.last, ","))
        elif text == "&&":
            for first, last in ((code.left_end(i), i), (i + 1, code.right_end(i + 1))):
                what = code.source[code.tokens[first].first : code.tokens[last - 1].last]
                self.add(i, f"no {what}", *self.around(first, last, "(QK_M(@) || (", "))"))
        elif text == "?":
            first = code.left_end(i)
            if code.tokens[first].text in ("return",):
                first += 1
            around = self.around(first, i, "(QK_M(@) != bool(", "))")
            self.add(i, "? the other way round", *around)
            self.add(i, "true ?", *self.around(first, i, "(QK_M(@) || (", "))"))

    def is_extremum(self, i: int) -> bool:
        """a > b ? a : b, where a >= b is the same."""
        line = self.code.source[self.code.tokens[i].first - 60 : self.code.tokens[i].last + 100]
        at = 60
        right = re.match(r"[<>]=? (.+?) \? (.+?) : ([^;),]+)", line[at:], re.DOTALL)
        if not right:
            return False
        a, b, c = (part.strip() for part in right.groups())
        return (line[:at].rstrip().endswith(b) and c.startswith(a)) or (
            line[:at].rstrip().endswith(c) and b == a
        )

    def in_for_header(self, i: int) -> bool:
        for j in range(i, max(i - 40, 0), -1):
            if self.code.tokens[j].text == "for" and self.code.mate[j + 1] > i:
                return True
        return False


def find_mutants(files: list[Path]) -> list[Mutant]:
    """The mutants of the device code of these files, numbered from 1."""
    found: list[Mutant] = []
    for path in files:
        found += Finder(path.name, path.read_text(), len(found) + 1).run()
    return found


def rewrite(text: str, mutants: list[Mutant]) -> tuple[str, list[tuple[int, int, int, int]]]:
    """`text` with all these mutants, and where in it they are: (line, first column, last, id)."""
    # At one place: what closes, the innermost first; then what opens, the outermost first.
    pieces: list[tuple[tuple[int, int, int, int], Edit, int]] = []
    for mutant in mutants:
        extent = max(e.last for e in mutant.edits) - min(e.first for e in mutant.edits)
        for edit in mutant.edits:
            order = -extent if edit.opens else extent
            # An insertion behind an operator precedes what opens the operand.
            number = -mutant.id if edit.opens else mutant.id
            pieces.append(((edit.first, int(edit.opens), order, number), edit, mutant.id))
    pieces.sort(key=lambda piece: piece[0])
    out: list[str] = []
    spans: list[tuple[int, int, int]] = []  # offsets in the new text, id
    done = at = 0
    for _, edit, number in pieces:
        out.append(text[done : edit.first])
        at += edit.first - done
        done = max(done, edit.last)
        out.append(edit.text)
        spans.append((at, at + len(edit.text), number))
        at += len(edit.text)
    out.append(text[done:])
    new = "".join(out)
    starts = [0, *(m.end() for m in re.finditer("\n", new))]
    places = []
    line = 0
    for first, last, number in sorted(spans):
        while line + 1 < len(starts) and starts[line + 1] <= first:
            line += 1
        places.append((line + 1, first - starts[line] + 1, last - starts[line] + 1, number))
    return new, places
