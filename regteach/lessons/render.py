"""From a lesson's data to HTML and plain text: header, claim, prediction, exercise, quiz and recap.

The pages use system fonts and inherit the colours of the theme, so they read in light and in dark. A state is always
a word; the colour of a border only repeats it. Disclosure is `<details>`, which works without a kernel, from disk
and from the keyboard. Texts may hold `code`, **bold**, *emphasis* and $mathematics$.
"""

import html
import math
import re
from collections.abc import Sequence
from typing import Any

from regteach.lessons import LessonText, Question

STYLE = """<style>
.rt { font-size: 0.95em; line-height: 1.5; max-width: 46em; margin: 0.3em 0; }
.rt p, .rt ul, .rt ol { margin: 0.35em 0; }
.rt .rt-title { font-size: 1.25em; font-weight: 600; margin: 0 0 0.3em; }
.rt .rt-part { font-weight: 600; margin: 0.9em 0 0.2em; }
.rt .rt-quiet { opacity: 0.78; }
.rt .rt-state { font-weight: 600; border: 1px solid; border-radius: 3px; padding: 0 0.4em; margin-right: 0.35em; }
.rt-line { border-left: 4px solid #8888; padding: 0.15em 0 0.15em 0.8em; }
.rt-good { border-left-color: #0072b2; }
.rt-bad { border-left: 4px double #d55e00; }
.rt details { border: 1px solid #8886; border-radius: 4px; margin: 0.3em 0; padding: 0.25em 0.7em; }
.rt summary { cursor: pointer; display: list-item; }
.rt summary:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
.rt details > p { border-top: 1px solid #8884; padding-top: 0.35em; }
</style>"""


def inline(text: str) -> str:
    """Turn `code`, **bold** and *emphasis* into HTML, escape the rest, and leave $mathematics$ to the page.

    Args:
        text: one paragraph of a lesson's text.
    """
    pieces = re.split(r"(`[^`]+`|\$[^$]+\$)", text)
    return "".join(_inline_piece(piece) for piece in pieces)


def _inline_piece(piece: str) -> str:
    safe = html.escape(piece, quote=False)
    if len(piece) > 1 and piece[0] == piece[-1] == "`":
        return f"<code>{safe[1:-1]}</code>"
    if len(piece) > 1 and piece[0] == piece[-1] == "$":
        return safe
    safe = re.sub(r"\*\*(\S(?:.*?\S)?)\*\*", r"<strong>\1</strong>", safe)
    return re.sub(r"\*(\S(?:.*?\S)?)\*", r"<em>\1</em>", safe)


def page(body: str) -> str:
    """Wrap a piece of HTML in the lesson's style."""
    return f'{STYLE}<div class="rt">{body}</div>'


def line(state: str, body: str, good: bool | None) -> str:
    """Write one line that begins with a state in words.

    Args:
        state: the word.
        body: HTML after it.
        good: True or False for a state that is settled, None for one that is open.
    """
    mark = {True: " rt-good", False: " rt-bad", None: ""}[good]
    return page(f'<div class="rt-line{mark}"><span class="rt-state">{html.escape(state)}</span>{body}</div>')


def header(text: LessonText) -> tuple[str, str]:
    """Write the head of a lesson: title, minutes, objectives, prerequisites and the self-check."""
    minutes = f"{text.minutes.fast:g} minutes (fast), {text.minutes.full:g} minutes (full length)"
    objectives = "".join(f"<li><strong>{o.id}</strong> {inline(o.text)}</li>" for o in text.objectives)
    needed = "".join(f"<li>{inline(p)}</li>" for p in text.prerequisites)
    checks = "".join(
        f"<details><summary>{inline(c.question)}</summary><p>{inline(c.answer)}</p></details>" for c in text.self_check
    )
    body = (
        f'<p class="rt-title">Lesson {text.id}: {inline(text.title)}</p>'
        f'<p>{inline(text.summary)}</p><p class="rt-quiet">{minutes}</p>'
        f'<p class="rt-part">Afterwards you can</p><ul>{objectives}</ul>'
        + (f'<p class="rt-part">You need</p><ul>{needed}</ul>' if needed else "")
        + f'<p class="rt-part">Check yourself (two minutes)</p>{checks}'
    )
    plain = "\n".join(
        [
            f"Lesson {text.id}: {text.title}",
            text.summary,
            minutes,
            "Afterwards you can:",
            *(f"  {o.id}  {o.text}" for o in text.objectives),
            *(["You need:"] if text.prerequisites else []),
            *(f"  {p}" for p in text.prerequisites),
            "Check yourself:",
            *(f"  {c.question}\n    Answer: {c.answer}" for c in text.self_check),
        ]
    )
    return page(body), plain


def choices(question: str, options: Sequence[str]) -> tuple[str, str]:
    """Write a prediction's question and choices, for print and the site."""
    items = "".join(f"<li>{inline(option)}</li>" for option in options)
    body = f'<div class="rt-line"><p><strong>Predict.</strong> {inline(question)}</p><ul>{items}</ul></div>'
    return page(body), "\n".join([f"Predict: {question}", *(f"  ( ) {option}" for option in options)])


def quiz(questions: Sequence[Question]) -> tuple[str, str]:
    """Write the quiz: each choice opens to its verdict and the reason."""
    blocks, plain = [], []
    for number, question in enumerate(questions, 1):
        opened = []
        plain.append(f"{number}. {question.question}")
        for choice in question.choices:
            verdict = "Right." if choice.correct else "Not quite."
            opened.append(
                f"<details><summary>{inline(choice.text)}</summary>"
                f"<p><strong>{verdict}</strong> {inline(choice.because)}</p></details>"
            )
            plain.append(f"   - {choice.text}\n       {verdict} {choice.because}")
        blocks.append(f'<p class="rt-part">{number}. {inline(question.question)}</p>{"".join(opened)}')
    lead = '<p class="rt-quiet">Open the choice that you think is right.</p>'
    return page(f'<p class="rt-title">Quiz</p>{lead}{"".join(blocks)}'), "\n".join(["Quiz", *plain])


def recap(lines: Sequence[str], claims: str, exercises: str, following: str) -> tuple[str, str]:
    """Write the recap: what was measured, claims held, exercises to do, and what is next."""
    items = "".join(f"<li>{inline(text)}</li>" for text in lines)
    body = (
        f'<p class="rt-title">Recap</p><ul>{items}</ul>'
        f"<p>{html.escape(claims)}<br>{html.escape(exercises)}</p>"
        f"<p><strong>Next.</strong> {inline(following)}</p>"
    )
    plain = ["Recap", *(f"  - {text}" for text in lines), claims, exercises, f"Next: {following}"]
    return page(body), "\n".join(plain)


def number(value: float, digits: int = 3) -> str:
    """Write a number with that many significant digits: 1.23, 0.0456, 1.2e-7; whole numbers in full: 5,021."""
    if not math.isfinite(value):
        return {"nan": "not a number", "inf": "infinity", "-inf": "minus infinity"}[str(float(value))]
    size = abs(value)
    if value == int(value) and size < 1e7:
        return f"{int(value):,}"
    if 1e-4 <= size < 1e7:
        before = len(str(int(size))) if size >= 1 else 1 + math.floor(math.log10(size))
        return f"{round(value, digits - before):,.{max(digits - before, 0)}f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def numbers(value: float, low: float | None, high: float | None) -> tuple[str, str]:
    """Write a value and its band with three digits, or as many as it takes to see on which side it lies.

    Returns:
        The value, and the band as "0.8 to 1", "at least 0.8" or "at most 2".
    """
    bounds = [bound for bound in (low, high) if bound is not None]
    for digits in range(3, 10):
        written = number(value, digits)
        if all(bound == value or number(bound, digits) != written for bound in bounds):
            break
    ends = [None if bound is None else _short(number(bound, digits)) for bound in (low, high)]
    if ends[0] is None:
        return written, f"at most {ends[1]}"
    if ends[1] is None:
        return written, f"at least {ends[0]}"
    return written, f"{ends[0]} to {ends[1]}"


def _short(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def claim(record: dict[str, Any]) -> tuple[str, str]:
    """Write a claim's line: held or FALLS, the value, its band, and the control's value."""
    value, low, high = (None if record[k] is None else float(record[k]) for k in ("value", "low", "high"))
    assert value is not None
    written, band = numbers(value, low, high)
    control = float(record["control"]["value"])
    compared, _ = numbers(control, low, high)
    unit = f" {record['unit']}" if record["unit"] else ""
    written, compared = (
        text + unit if math.isfinite(size) else text for text, size in ((written, value), (compared, control))
    )
    name = record["control"]["name"]
    state = "held" if record["held"] else "FALLS"
    why = f" {record['why']}" if record["why"] else ""
    body = (
        f"{inline(record['says'])}: <strong>{html.escape(written)}</strong>. "
        f'<span class="rt-quiet">Band: {band}{html.escape(unit)}. '
        f"Control, {inline(name)}: {html.escape(compared)}.</span>{html.escape(why)}"
    )
    plain = f"[{state}] {record['says']}: {written}. Band: {band}{unit}. Control, {name}: {compared}.{why}"
    return line(state, body, record["held"]), plain
