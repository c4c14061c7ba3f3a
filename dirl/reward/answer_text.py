r"""Answers as people and models write them -> one spelling, and the verdicts that need no algebra.

`normalize_answer` is a list of rules, each of which takes one freedom of writing away (Unicode, thousands, units, plain
functions, ...) without changing what is meant. An answer may name one thing only: words such as `or` are never dropped.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MIN_ROUNDED_DIGITS = 4  # significant ones: 2.667 is 8/3, 0.33 is not 1/3

# NFKC would make `x2` of a superscript, so these become LaTeX first; the others are signs that NFKC leaves alone.
_SIGNS = {"\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u2044": "/"}
_SIGNS |= {"\u221e": r"\infty ", "\u222a": r"\cup ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne "}
_SIGNS |= {"\u03c0": r"\pi ", "\u00f7": r"\div ", "\u00b0": r"^\circ ", "\u2248": r"\approx ", "\u2261": r"\equiv "}
_SIGNS |= {"\u221a": r"\sqrt ", "\u2019": "'"}
_SCRIPTS = {"<super>": "^{{{}}}", "<sub>": "_{{{}}}"}


def _fold_character(character: str) -> str:
    """One character -> what it means in ASCII LaTeX, as far as Unicode says."""
    if character in _SIGNS:
        return _SIGNS[character]
    kind, _, _ = unicodedata.decomposition(character).partition(" ")
    folded = unicodedata.normalize("NFKC", character)
    if kind in _SCRIPTS:
        return _SCRIPTS[kind].format(folded)
    if kind == "<fraction>" and not folded.endswith("\u2044"):
        return r"\frac{{{}}}{{{}}}".format(*folded.split("\u2044"))
    category = unicodedata.category(character)
    if category in ("Cf", "Sc"):  # zero-width and direction marks; currencies
        return ""
    if category == "Cc":  # NUL, tab, line feed
        return " "
    return str(unicodedata.decimal(character)) if category == "Nd" else folded


def fold_unicode(text: str) -> str:
    return "".join(character if " " <= character <= "~" else _fold_character(character) for character in text)


_SEPARATOR = r"\{,\}|,\\!\s*|\\[,;: ]|\\thinspace\s|\{\\,\}|\\(?:text|mathord)\{,\}|[ ~']"
_GROUPS = re.compile(
    rf"(?<![0-9.,])([1-9][0-9]{{0,2}})((?:{_SEPARATOR})[0-9]{{3}}(?:\s?(?:{_SEPARATOR})[0-9]{{3}})*)(?![0-9])"
)


def join_thousands(text: str) -> str:
    r"""1{,}000, 1,\!000, 1\,000, 1 000 and 1'000 as 1000; plain commas stay: `1,000` may be a pair."""
    return _GROUPS.sub(lambda match: match[1] + re.sub(_SEPARATOR + r"|\s", "", match[2]), text)


_DELIMITERS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]|\\(?:boxed|fbox)(?=\s*\{)|\\!|^\s*(?:\\approx|=)(?![a-zA-Z])")


_OPEN_BOX = re.compile(r"^\s*\\boxed\s*\{")


def drop_delimiters(text: str) -> str:
    r"""Dollars, \(, \[ and the command of a box, with its brace where that is never closed."""
    is_open = text.count("{") > text.count("}")
    return _DELIMITERS.sub("", _OPEN_BOX.sub("", text) if is_open else text)


_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z])")


def undouble_commands(text: str) -> str:
    r"""\\frac, which went through JSON twice, as \frac; after a line break of an environment stands no command."""
    return text if r"\begin" in text else _DOUBLED.sub(r"\\", text)


_TEXT = r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it)|operatorname)\s*"
_WHOLE_TEXT = re.compile(rf"{_TEXT}\{{([^{{}}]*[a-zA-Z][^{{}}]*)\}}")


def unwrap_text(text: str) -> str:
    r"""\text{8 people} as 8 people."""
    match = _WHOLE_TEXT.fullmatch(text.strip())
    return match[1] if match else text


_ROMAN = re.compile(
    r"(?:\\math(?:rm|it|bf)|\\text(?=\s*\{\s*e\s*\}))\s*\{\s*([a-zA-Z]|\\[a-zA-Z]+)\s*\}(?![a-zA-Z])"
    r"|(?<=_)\{\s*\\(odot|oplus)\s*\}"
)


def drop_fonts(text: str) -> str:
    r"""\mathrm{e} as e, k_{\mathrm{B}} as k_{B}; symbols in subscripts as the letters of their names."""
    return _ROMAN.sub(lambda match: match[1] or f"{{{match[2]}}}", text)


_FRACTION_OF_PI = re.compile(r"(\\[dtc]?frac)\s*\\pi(?![a-zA-Z])")  # math-verify reads `\frac\pi2` as \frac{\}{p}i2
_FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp"
_FUNCTIONS += " pi theta alpha beta gamma delta epsilon lambda mu rho sigma tau phi psi omega"
_PLAIN_FUNCTION = re.compile(rf"(?<![a-zA-Z\\])({'|'.join(_FUNCTIONS.split())})(?![a-zA-Z])")
_PLAIN_ROOT = re.compile(r"(?<![a-zA-Z\\])sqrt\s*(?:([0-9]+|[a-zA-Z])(?![a-zA-Z])|(?=[({]))")
_INFINITY = re.compile(r"(?<![a-zA-Z\\])(?:infinity|inf|oo)(?![a-zA-Z])")
_ARGUMENT = re.compile(r"(\\sqrt|\^)\s*\(")


def spell_functions(text: str) -> str:
    r"""sqrt(2), 2pi, sin(x), x**2 and infinity as LaTeX has them."""
    text = _PLAIN_FUNCTION.sub(r"\\\1 ", _INFINITY.sub(r"\\infty ", text.replace("**", "^")))
    text = _PLAIN_ROOT.sub(lambda match: rf"\sqrt{{{match[1]}}}" if match[1] else r"\sqrt", text)
    text = _FRACTION_OF_PI.sub(r"\1{\\pi}", text)
    start = 0
    while match := _ARGUMENT.search(text, start):
        end = _closing(text, match.end() - 1)
        if end is None:
            break
        text = f"{text[: match.end() - 1]}{{{text[match.end() : end]}}}{text[end + 1 :]}"
        start = match.end()
    return text


def _closing(text: str, start: int) -> int | None:
    """Where the bracket closes that opens at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return None


_SCIENTIFIC = re.compile(r"(?<![a-zA-Z0-9_.^])([0-9]*\.?[0-9]+)[eE]([-+]?)([0-9]{1,3})(?![a-zA-Z0-9.])")


def write_out_exponent(text: str) -> str:
    r"""1e-7 as 1 \times 10^{-7}."""
    sign = {"-": "-"}
    return _SCIENTIFIC.sub(lambda m: rf"{m[1]} \times 10^{{{sign.get(m[2], '')}{m[3]}}}", text)


_BARE_POINT = re.compile(r"(?<![0-9.])\.(?=[0-9])")


def write_leading_zero(text: str) -> str:
    """.5 as 0.5."""
    return _BARE_POINT.sub("0.", text)


_PERCENT = re.compile(rf"\s*(?:{_TEXT}\{{\s*)?(?<![a-zA-Z])(?:percentage|percent|pct)(?![a-zA-Z])\s*\}}?")
_BASE_TEN = re.compile(r"(?<=[0-9])_(?:\{10\}|10(?![0-9]))|(?<=[0-9])_\{?\\text\{ten\}\}?")
_NAMED_BASE = re.compile(r"(?<=[0-9A-F])\s*(?:\\text\s*\{\s*)?(?:in )?base\s*([0-9]{1,2})\s*\}?$")


def write_bases_and_percents(text: str) -> str:
    r"""`25_{10}` as 25, `11 base 2` as 11_{2}, `5 percent` as 5\%."""
    return _NAMED_BASE.sub(r"_{\1}", _BASE_TEN.sub("", _PERCENT.sub(r"\\%", text)))


_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"([0-9])\s*(?:\\[ ,])?\s*(?:{_TEXT}\{{\s*)?({'|'.join(_SCALES)})(?![a-zA-Z])\s*([^{{}}]*)(\}}?)")


def write_out_scales(text: str) -> str:
    r"""2 million people as 2 \times 10^{6} people."""

    def spell(match: re.Match[str]) -> str:
        rest = rf" \text{{{match[3]}}}" if match[4] and match[3].strip() else f" {match[3]}"
        return rf"{match[1]} \times 10^{{{_SCALES[match[2]]}}}{rest}".rstrip()

    return _SCALE.sub(spell, text)


_CURRENCY = re.compile(
    rf"^(?:US|USD|EUR|GBP|INR|Rs\.?|\\pounds|\\euro|{_TEXT}\{{\s*(?:USD|EUR|GBP|Rs\.?)\s*\}})\s*(?=[0-9.])"
)
_EXPONENT = r"(?:\s*\^\s*\{?-?[0-9]\}?)?"
_SPACE = r"(?:\s|~|\\[ ,;:]|\\q?quad)"
_LAST_WORD = re.compile(
    rf"(?:{_TEXT}\{{([^{{}}0-9]*)\}}|(?<![a-zA-Z\\])([a-zA-Z]{{2,}}|(?<=[a-z]/)[hsd])\.?){_EXPONENT}{_SPACE}*$"
)
_BETWEEN_UNITS = re.compile(rf"{_SPACE}*(?:[/-]|\\cdot|){_SPACE}*$")
_VALUE_END = re.compile(r"(?:[0-9)}\]!%]|\\pi|\\circ)$")
_AFTER_DEGREES = re.compile(r"(?<=\\circ)\s*\}?\s*[CF]$")
# Shorter words than four letters, outside of \text{}, are products of variables unless they stand here.
_SHORT_UNITS = (
    "cm mm km dm nm ft yd mi in lb lbs oz kg mg gm ml mL hr hrs min sec ms mph kmh kph sq cu deg rad gal mol Hz"
)
_SHORT_UNITS += " kHz kW kWh kJ eV Pa kPa USD EUR GBP INR Rs pts day ton men man cup box per an of h s d"
_UNITS = frozenset(_SHORT_UNITS.split())
# What a list, a condition, a doubt or a factor is made of is no unit.
_NO_UNITS = "and or not but nor with without then else plus minus times over mod modulo base where when than if for"
_NO_UNITS += " none only either both also maybe possibly is are percent dozen " + " ".join(_SCALES)
_NEVER_UNITS = frozenset(_NO_UNITS.split())


def drop_units(text: str) -> str:
    r"""8 people, 8 \text{ cm}^2, 8 km/h, USD 8 and 8^\circ C as 8 and 8^\circ: words after a number, to the end."""
    text = _AFTER_DEGREES.sub("", _CURRENCY.sub("", text.lstrip().rstrip(" .,;\\")))
    rest = text
    while match := _LAST_WORD.search(rest):
        words = (match[1] or match[2] or "").split()
        if any(word.strip(".,").lower() in _NEVER_UNITS for word in words):
            return text
        if match[2] and len(match[2]) < 4 and match[2] not in _UNITS:
            return text
        rest = _BETWEEN_UNITS.sub("", rest[: match.start()])
    return rest if _VALUE_END.search(rest) else text


_AND_OR = r"\\text\s*\{\s*(?:and|or)\s*\}|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])"
_JOINT = re.compile(rf"(?:\\q?quad\s*)*(?:{_AND_OR})(?:\s*\\q?quad)*")


def part_solutions(text: str) -> str:
    """x=1, y=2 or x=3, y=4 as x=1, y=2; x=3, y=4."""
    parts = _JOINT.split(text)
    are_systems = len(parts) > 1 and all(part.count("=") > 1 and "," in part for part in parts)
    return ";".join(parts) if are_systems else text


RULES = (
    *(fold_unicode, undouble_commands, join_thousands, drop_delimiters, unwrap_text, write_bases_and_percents),
    *(
        write_out_scales,
        drop_fonts,
        spell_functions,
        write_leading_zero,
        write_out_exponent,
        drop_units,
        part_solutions,
    ),
)


def normalize_answer(answer: str) -> str:
    """An answer without what does not change its meaning."""
    for rule in RULES:
        answer = rule(answer)
    return " ".join(answer.split()).lstrip(" ,;").rstrip(" .,;\\")


_LETTER_UNIT = re.compile(r"(?<=[0-9])\s*(?:\\[ ,;])?\s*[mgshLlNJWVAKC](?:\^\{?[23]\}?)?$")


def drop_letter_unit(gold: str, answer: str) -> str:
    """The answer without a unit of one letter, which it may have where the gold names no variable: `6m` is not 6."""
    return answer if re.search("[a-zA-Z]", gold) else _LETTER_UNIT.sub("", answer)


_CHOICE = re.compile(
    rf"(?:{_TEXT}\{{\s*\(?([A-J])[.):]?\s*\}}|\(([A-J])\)|([A-J])(?:[.:)](?=\s|\\|$)|$))[.:]?{_SPACE}*"
    rf"(?P<rest>(?!{_SPACE}|\\cup|\\cap|\\times|\\cdot|\\setminus|\\in(?![a-z])|[-+]\s|[=^_*/(<>]).*)"
)
_OTHER_CHOICE = re.compile(r"\([A-J]\)|(?<![a-zA-Z])(?:or|and)(?![a-zA-Z])")


def split_choice(answer: str) -> tuple[str, str]:
    r"""The letter and the text of `\textbf{(B)}\ 5`, `B. 5`, `(B)`, B; no letter for an answer that names no choice."""
    match = _CHOICE.fullmatch(answer)
    if match is None or _OTHER_CHOICE.search(match["rest"]):
        return "", answer
    return match[1] or match[2] or match[3], match["rest"].strip()


_RATIONAL = re.compile(
    r"(?P<whole>[-+]?[0-9]{1,300}|-?[1-9][0-9]{0,2}(?:,[0-9]{3}){1,99})"
    r"|(?P<minus>-?)(?:\\[dtc]?frac\{(?P<top>-?[0-9]{1,300})\}\{(?P<bottom>-?[0-9]{1,300})\}"
    r"|(?P<over>[0-9]{1,300})/(?P<under>[0-9]{1,300}))"
)
_DECIMAL = re.compile(r"[-+]?[0-9]{0,100}\.?[0-9]{1,100}")
_BASED = re.compile(
    r"(?:[a-zA-Z]\s*=\s*)?(?:\\left\s*)?\(?\s*([0-9][0-9A-F]*)\s*(?:\\right\s*)?\)?"
    r"_\{?([0-9]{1,2})\}?\s*(?:\\right\s*)?\)?"
)


def _read_rational(answer: str) -> Fraction | None:
    """The value of a whole number or of a plain fraction; None for anything else."""
    match = _RATIONAL.fullmatch(answer)
    if match is None:
        return None
    if match["whole"]:
        return Fraction(match["whole"].replace(",", ""))
    bottom = int(match["bottom"] or match["under"])
    value = Fraction(int(match["top"] or match["over"]), bottom) if bottom else None
    return -value if value and match["minus"] else value


def _read_list(answer: str) -> list[Fraction] | None:
    """Numbers between commas, two or more."""
    items = [item.strip() for item in answer.split(",")]
    values = [Fraction(item) if _DECIMAL.fullmatch(item) else _read_rational(item) for item in items]
    known = [value for value in values if value is not None]
    return known if len(known) == len(items) > 1 else None


def decide_quickly(gold: str, answer: str) -> bool | None:
    """Whether two normalised answers are equal where no algebra is needed to say so, else None.

    A number with a base equals the same digits in the same base. A list without brackets is a set where one of the two
    writes it as one, in ascending order; else its order counts.
    """
    if gold == answer:
        return True
    based_gold, based_answer = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    if based_gold:
        return based_answer is not None and based_gold.groups() == based_answer.groups()
    if based_answer:  # the question may have set the base
        return based_answer[1] == gold
    gold_value, answer_value = _read_rational(gold), _read_rational(answer)
    if gold_value is not None and answer_value is not None:
        return gold_value == answer_value
    golds, answers = _read_list(gold), _read_list(answer)
    if gold_value is not None or answer_value is not None or golds is None or answers is None:
        return None
    in_order = sorted(golds)
    return golds == answers or (in_order == sorted(answers) and in_order in (golds, answers))


def split_items(answer: str) -> tuple[str, list[str]] | None:
    """The brackets of a tuple or interval, and its items; None for anything else."""
    opening, closing, inside = answer[:1], answer[-1:], answer[1:-1]
    if opening not in ("(", "[") or closing not in (")", "]"):
        return None
    items, depth, start = [], 0, 0
    for place, character in enumerate(inside):
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None
        if character == "," and depth == 0:
            items.append(inside[start:place])
            start = place + 1
    items.append(inside[start:])
    return (opening + closing, [item.strip() for item in items]) if depth == 0 and len(items) > 1 else None


def is_rounded(decimal: str, value: Fraction) -> bool:
    """Whether a decimal number of at least four significant digits is the value, rounded to its last place."""
    _, point, places = decimal.partition(".")
    digits = re.sub(r"[-+.]", "", decimal).lstrip("0")
    if not point or not _DECIMAL.fullmatch(decimal) or len(digits) < MIN_ROUNDED_DIGITS:
        return False
    return abs(Fraction(decimal) - value) * 2 <= Fraction(1, 10 ** len(places))
