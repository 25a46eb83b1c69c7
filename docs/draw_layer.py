#!/usr/bin/env python3
"""Draws docs/layer.svg, the picture of a mixture-of-experts layer:

    python3 docs/draw_layer.py
"""

import pathlib

WIDTH, HEIGHT = 960, 375
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"]  # one a token
INK, LINE, PALE = "#303030", "#808080", "#f4f4f4"

TOKENS = 4
EXPERTS = 5
# The two experts of each token, with their weights; the fourth one gets none.
CHOSEN = [[(0, 0.7), (2, 0.3)], [(1, 0.6), (4, 0.4)], [(0, 0.5), (1, 0.5)], [(2, 0.8), (4, 0.2)]]

parts = []


def text(x, y, words, size=15, anchor="middle", colour=INK, style=""):
    parts.append(
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" {style}>'
        f"{words}</text>"
    )


def box(x, y, width, height, fill, stroke=LINE, radius=4, dash=""):
    parts.append(
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}" '
        f'stroke="{stroke}" {dash}/>'
    )


def line(x1, y1, x2, y2, colour, width=1.5, head=False):
    bend = (x1 + x2) / 2
    end = ' marker-end="url(#head)"' if head else ""
    parts.append(
        f'<path d="M{x1} {y1} C{bend} {y1} {bend} {y2} {x2} {y2}" fill="none" stroke="{colour}" '
        f'stroke-width="{width:.1f}"{end}/>'
    )


def token_y(t):
    return 130 + 52 * t


def expert_y(e):
    return 96 + 56 * e


X_IN, X_GATE, X_EXPERT, X_OUT = 60, 190, 560, 850

for title, under, x in [
    ("x", "T x D, a token a row", X_IN + 30),
    ("gate", "K of E experts a token", X_GATE + 60),
    ("dispatch", "slots by expert", 432),
    ("experts", "only those with tokens run", X_EXPERT + 75),
    ("combine", "sums by weight", 770),
    ("y", "T x D", X_OUT + 30),
]:
    text(x, 32, title, 18, style='font-weight="bold"')
    text(x, 54, under, 13, colour="#606060")

box(X_GATE, 100, 120, 250, PALE)
for t in range(TOKENS):
    y = token_y(t)
    box(X_IN, y - 12, 60, 24, COLOURS[t], COLOURS[t])
    box(X_OUT, y - 12, 60, 24, COLOURS[t], COLOURS[t])
    line(X_IN + 64, y, X_GATE - 4, y, COLOURS[t], 2)
    chosen = {e for e, _ in CHOSEN[t]}
    for e in range(EXPERTS):  # scores, the chosen ones filled
        height = {True: 22, False: 6 + (5 * e + 7 * t) % 9}[e in chosen]
        box(X_GATE + 16 + 18 * e, y + 12 - height, 12, height,
            COLOURS[t] if e in chosen else "#c8c8c8", "none", 1)

for e in range(EXPERTS):
    y = expert_y(e)
    slots = [(t, w) for t in range(TOKENS) for f, w in CHOSEN[t] if f == e]
    used = bool(slots)
    box(X_EXPERT, y - 20, 150, 40, "#ffffff" if used else PALE, LINE, 6,
        "" if used else 'stroke-dasharray="4 4"')
    text(X_EXPERT + 75, y + 5, f"expert {e}" if used else f"expert {e}: idle", 14,
         colour=INK if used else "#909090")
    for place, (t, weight) in enumerate(slots):
        at = y - 7 + 14 * place
        line(X_GATE + 124, token_y(t), X_EXPERT - 22, at, COLOURS[t], 1.5)
        box(X_EXPERT - 20, at - 5, 18, 10, COLOURS[t], COLOURS[t], 1)
        line(X_EXPERT + 152, at, X_OUT - 6, token_y(t), COLOURS[t], 0.8 + 4 * weight, True)

svg = (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
    f'height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif">\n'
    '<defs><marker id="head" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="7" markerHeight="7" '
    'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 L6 3 L0 6 z" fill="#606060"/></marker>'
    "</defs>\n"
    f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
)
pathlib.Path(__file__).with_name("layer.svg").write_text(svg)
