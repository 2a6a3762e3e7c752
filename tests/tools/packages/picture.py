#!/usr/bin/env python3
"""Draws what a program showed on a terminal as SVG: picture.py TITLE < ANSI > SVG"""

import html
import re
import sys

COLOURS = {"32": "#3fb950", "33": "#d29922", "1;31": "#ff7b72", "2": "#8b949e", "1": "#f0f6fc"}
WIDTH, HEIGHT, LEFT, TOP = 7.83, 19, 18, 44


def main():
    # What was written over is not there any more: the count of checks while they are made.
    text = sys.stdin.buffer.read().decode().replace("\r\n", "\n")
    lines = [re.split(r"\r|\x1b\[K", line)[-1] for line in text.strip().split("\n")]
    lines = [line for i, line in enumerate(lines) if line or i and lines[i - 1]]
    lines = lines[next(i for i, line in enumerate(lines) if line) :]
    title = html.escape(sys.argv[1])
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    width = round(max(map(len, plain)) * WIDTH + 2 * LEFT)
    height = len(lines) * HEIGHT + TOP + 14
    print(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">\n'
        f"<title>{title}</title>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>\n'
        f'<text x="{LEFT}" y="25" font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,\'DejaVu Sans Mono\',monospace" '
        f'font-size="13" fill="#8b949e">$ {title}</text>\n'
        '<g font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,\'DejaVu Sans Mono\',monospace" font-size="13" '
        'fill="#c9d1d9">'
    )
    for number, line in enumerate(lines):
        y = TOP + (number + 1) * HEIGHT - 5
        if line:
            print(f'<text x="{LEFT}" y="{y}">{spans(line)}</text>')
    print("</g>\n</svg>")


def spans(line):
    """Every piece at its column, so that a font of another width breaks no table."""
    out, code, column = [], "", 0
    for part in re.split(r"(\x1b\[[0-9;]*m)", line):
        if part.startswith("\x1b"):
            code = part[2:-1]
        elif part:
            colour = COLOURS.get(code)
            style = f' fill="{colour}"' if colour else ""
            weight = ' font-weight="bold"' if code.startswith("1") else ""
            out.append(f'<tspan x="{LEFT + column * WIDTH:.1f}"{style}{weight}>{html.escape(part).replace(" ", "&#160;")}</tspan>')
            column += len(part)
    return "".join(out)


if __name__ == "__main__":
    main()
