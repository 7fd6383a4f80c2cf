"""How report.html looks."""

__all__ = ["CSS"]

CSS = """
:root { --ink: #20262d; --soft: #69717b; --line: #e4e1da; --paper: #fbfaf7; --card: #ffffff; --accent: #0f766e; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-font-smoothing: antialiased;
       font: 16px/1.55 "Charter", "Bitstream Charter", "Iowan Old Style", "Source Serif 4", Georgia, serif; }
main { max-width: 980px; margin: 0 auto; padding: 52px 24px 72px; }
h1, h2, th, .number b, .number span, .kicker, figcaption, nav, .sample h3 {
       font-family: "Inter", "Segoe UI", "Helvetica Neue", "DejaVu Sans", Arial, sans-serif; }
.kicker { font-size: 12px; letter-spacing: .09em; text-transform: uppercase; color: var(--accent); font-weight: 600; }
h1 { font-size: 33px; line-height: 1.15; letter-spacing: -.018em; margin: 6px 0 12px; }
h2 { font-size: 19px; letter-spacing: -.01em; margin: 46px 0 6px; }
h2 i { font-style: normal; color: var(--accent); margin-right: .45em; }
p { max-width: 72ch; margin: 6px 0 12px; }
.lead { font-size: 18px; color: #3c444d; }
.soft { color: var(--soft); font-size: 14px; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); gap: 10px; margin: 26px 0 8px; }
.number { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px 11px; }
.number b { display: block; font-size: 23px; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.number span { font-size: 12px; line-height: 1.35; color: var(--soft); display: block; }
figure { margin: 14px 0 8px; background: var(--card); border: 1px solid var(--line); border-radius: 12px;
         padding: 16px 18px 10px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: 12.5px; color: var(--soft); margin: 8px 0 2px; line-height: 1.45; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 12px 0; font-size: 14px; font-variant-numeric: tabular-nums;
        background: var(--card); border: 1px solid var(--line); border-radius: 12px; border-spacing: 0; }
th { font-size: 11.5px; color: var(--soft); font-weight: 600; text-align: right; vertical-align: bottom; }
th, td { padding: 7px 12px; border-bottom: 1px solid var(--line); text-align: right; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 12px; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px 14px;
          min-width: 0; }
.sample h3 { font-size: 13px; margin: 0 0 6px; }
pre { margin: 0; font: 12.5px/1.5 "JetBrains Mono", "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
      white-space: pre-wrap; overflow-wrap: anywhere; }
pre + .soft { margin: 2px 0 12px; font-size: 12px; }
pre b { color: var(--accent); font-weight: 600; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--accent); font-size: 14px; }
footer { margin-top: 48px; padding-top: 14px; border-top: 1px solid var(--line); }
"""
